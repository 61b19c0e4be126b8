# SPDX-License-Identifier: Apache-2.0
"""Virtual token counters: lifting, weights, and that forgetting an account changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.scheduling.accounts import Account, Accounts, backlogged, charge, close, emptied
from profiles import examples


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
    charge(ahead, 10_000)
    close(ahead)
    for i in range(500):
        path = accounts.open((f"passing {i}", 1.0))
        backlogged(path)
        charge(path, 1)
        emptied(path)
        close(path)
        charge(stays, 1.9)
    assert len(accounts.root.children) < 200
    assert accounts.open(("ahead", 1.0))[0].served == 10_000


@examples(100)
@given(data=st.data())
def test_who_comes_back_stands_with_the_least_or_with_its_fair_share_if_that_is_more(data: st.DataObject):
    accounts = Accounts()
    paths = [accounts.open((str(i), 1.0)) for i in range(4)]
    waiting: set[int] = set()
    fair = 0.0
    for _ in range(data.draw(st.integers(1, 40))):
        i = data.draw(st.integers(0, 3))
        action = data.draw(st.sampled_from(["charge", "turn"]))
        if action == "charge":
            service = data.draw(st.integers(1, 9))
            charge(paths[i], service)
            fair += service / 4
        elif i in waiting:
            waiting.remove(i)
            emptied(paths[i])
        else:
            before, least = paths[i][0].served, min((paths[j][0].served for j in waiting), default=None)
            backlogged(paths[i])
            fair = accounts.root.fair if least is None else max(fair, least)
            assert paths[i][0].served == max(before, fair)
            waiting.add(i)
        if waiting:
            assert accounts.root.level() == min(paths[j][0].served for j in waiting)


def test_a_root_of_nobody_stands_at_zero():
    assert Account().level() == pytest.approx(0.0)


def test_what_a_cap_holds_back_saves_nothing_up_and_keeps_nobody_down():
    accounts = Accounts()
    capped, busy, back = (accounts.open(("class", 1.0), (name, 1.0), ("", 1.0)) for name in ("capped", "busy", "back"))
    for path in (capped, busy):
        backlogged(path)
    capped[1].hold()
    capped[1].hold()  # it is seen at every step
    charge(busy, 100)
    emptied(busy)
    assert not capped[0].backlog, "its class has nothing to serve"
    backlogged(busy)
    backlogged(back)
    assert back[1].served == 100
    capped[1].unhold()
    assert (capped[1].served, capped[0].backlog) == (100, 3)
    for path in (capped, busy, back):
        emptied(path)
    assert not capped[0].backlog


def test_lines_that_come_and_go_while_their_tenant_is_held_balance():
    accounts = Accounts()
    one, two = (accounts.open(("class", 1.0), ("t", 1.0), (adapter, 1.0)) for adapter in "ab")
    one[1].hold()
    backlogged(one)
    backlogged(two)
    emptied(one)
    assert (one[0].backlog, one[1].backlog) == (0, 1)
    one[1].unhold()
    assert one[0].backlog == 1
    emptied(two)
    assert (one[0].backlog, one[1].backlog) == (0, 0)


def test_accounts_that_come_and_go_leave_no_heap_behind():
    accounts = Accounts()
    stays, comes = accounts.open(("stays", 1.0)), accounts.open(("comes", 1.0))
    backlogged(stays)
    for _ in range(2000):
        backlogged(comes)
        charge(comes, 1)
        emptied(comes)
    assert len(accounts.root._least) < 200
    assert accounts.root.level() == 0


def test_newcomers_start_behind_who_has_less_than_its_fair_share():
    accounts = Accounts()
    behind, ahead = accounts.open(("behind", 1.0)), accounts.open(("ahead", 1.0))
    backlogged(behind)
    backlogged(ahead)
    charge(ahead, 60)
    new = accounts.open(("new", 2.0))
    backlogged(new)
    assert new[0].served == 30, "what each of the two should have had"
    charge(ahead, 60)
    close(ahead)
    charge(new, 40)
    later = accounts.open(("later", 1.0))
    assert later[0].served == pytest.approx(30 + 60 / 4 + 40 / 3), "shared by weight among those who are there"
