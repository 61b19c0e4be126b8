# SPDX-License-Identifier: Apache-2.0
"""Virtual token counters: lifting, weights, and that forgetting an account changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora_backend.scheduling.accounts import Account, Accounts, backlogged, charge, close, emptied


def test_who_comes_back_starts_where_the_least_of_those_who_wait_stands():
    accounts = Accounts()
    a, b, idle = (accounts.open((name, 1.0)) for name in ("a", "b", "idle"))
    for path in (a, b):
        backlogged(path)
    charge(a, 100)
    charge(b, 60)
    backlogged(idle)
    assert idle[0].served == 60, "it has saved up nothing"
    emptied(idle)
    charge(b, 100)
    backlogged(idle)
    assert idle[0].served == 100


def test_who_comes_back_to_nobody_starts_where_the_last_one_stands():
    accounts = Accounts()
    a, b = accounts.open(("a", 1.0)), accounts.open(("b", 1.0))
    backlogged(a)
    charge(a, 10)
    emptied(a)
    charge(a, 90)  # what still runs
    backlogged(b)
    assert b[0].served == 100


def test_nobody_is_lowered():
    accounts = Accounts()
    a, b = accounts.open(("a", 1.0)), accounts.open(("b", 1.0))
    backlogged(b)
    charge(a, 100)
    backlogged(a)
    assert (a[0].served, b[0].served) == (100, 0)


def test_service_counts_by_weight_at_every_level():
    accounts = Accounts()
    path = accounts.open(("class", 4.0), ("tenant", 2.0), ("adapter", 1.0))
    other = accounts.open(("class", 4.0), ("tenant", 2.0), ("other", 1.0))
    charge(path, 8)
    assert [account.served for account in path] == [2, 4, 8]
    assert path[:2] == other[:2]
    assert other[2].served == 0


def test_a_tenant_with_two_adapters_is_lifted_once():
    """The tenant is not idle as long as one of its adapters has something waiting."""
    accounts = Accounts()
    one, two, rival = (accounts.open(*path) for path in ((("t", 1), ("1", 1)), (("t", 1), ("2", 1)), (("r", 1),)))
    backlogged(one)
    backlogged(rival)
    charge(rival, 50)
    backlogged(two)
    assert two[0].served == 0
    emptied(one)
    emptied(two)
    backlogged(two)
    assert two[0].served == 50


def test_accounts_of_those_who_are_gone_are_forgotten_unless_they_are_ahead():
    accounts = Accounts()
    stays = accounts.open(("stays", 1.0))
    backlogged(stays)
    ahead = accounts.open(("ahead", 1.0))
    charge(ahead, 1000)
    close(ahead)
    for i in range(500):
        path = accounts.open((f"passing {i}", 1.0))
        backlogged(path)
        charge(path, 1)
        emptied(path)
        close(path)
        charge(stays, 1.9)
    assert len(accounts.root.children) < 200
    assert accounts.open(("ahead", 1.0))[0].served == 1000


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_level_is_the_least_counter_of_those_who_wait(data: st.DataObject):
    accounts = Accounts()
    paths = [accounts.open((str(i), 1.0)) for i in range(4)]
    waiting: set[int] = set()
    for _ in range(data.draw(st.integers(1, 40))):
        i = data.draw(st.integers(0, 3))
        action = data.draw(st.sampled_from(["charge", "turn"]))
        if action == "charge":
            charge(paths[i], data.draw(st.integers(1, 9)))
        elif i in waiting:
            waiting.remove(i)
            emptied(paths[i])
        else:
            level = min((paths[j][0].served for j in waiting), default=None)
            before = paths[i][0].served
            backlogged(paths[i])
            if level is not None:
                assert paths[i][0].served == max(before, level)
            waiting.add(i)
        if waiting:
            assert accounts.root.level() == min(paths[j][0].served for j in waiting)


def test_a_root_of_nobody_stands_at_zero():
    assert Account().level() == pytest.approx(0.0)
