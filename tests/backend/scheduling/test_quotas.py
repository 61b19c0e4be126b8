# SPDX-License-Identifier: Apache-2.0
"""Caps of tenants in virtual time: sequences, tokens, waiting, bytes. Delayed is not refused, and harms nobody else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.core import FinishReason
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.scheduling.ledger import to_give_up
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.quotas import Quota
from multilora_backend.scheduling.tenants import Tenant, Tenants
from virtual_scheduler import FakeAdapters, Traffic, add, make


def traffic_for(tenant: dict, adapters: FakeAdapters | None = None, **settings) -> Traffic:
    tenants = Tenants.parse({"tenants": {"t": tenant}})
    policy = Policy(tenure_s=1.0, max_overtake_s=0.5)
    return Traffic(make(num_pages=2000, tenants=tenants, adapters=adapters, policy=policy, **settings))


def test_no_more_sequences_run_at_the_same_time_than_the_cap():
    traffic = traffic_for({"max_running": 2})
    capped = [add(traffic.scheduler, 5, ("a", "b", "")[i % 3], tenant="t", max_len=25) for i in range(9)]
    others = [add(traffic.scheduler, 5, "a", tenant="u", max_len=25) for _ in range(4)]
    while traffic.scheduler.has_work:
        plan = traffic.step()
        assert sum(slot.sequence.tenant == "t" for slot in plan.slots) <= 2
        assert traffic.now < 20
    assert all(s.started == 0.0 for s in others)
    assert all(s.finished for s in capped)


@pytest.mark.parametrize("adapter", ["", "a"])
def test_tokens_over_time_stay_within_rate_and_burst(adapter: str):
    traffic = traffic_for({"tokens_per_s": 100.0, "burst_tokens": 50.0})
    for _ in range(40):
        add(traffic.scheduler, 10, adapter, tenant="t", max_len=20)
    tokens = 0
    while traffic.scheduler.has_work:
        plan = traffic.step()
        tokens += sum(s.count if not s.samples or s.count > 1 else 1 for s in plan.slots if s.sequence.tenant == "t")
        debt = 8 * 20  # what runs is not stopped
        assert tokens <= 100 * traffic.now + 50 + debt
        assert traffic.now < 20
    assert traffic.now == pytest.approx((40 * 20 - 50) / 100, rel=0.25), "nothing is lost either"


def test_a_delayed_tenant_says_when_it_goes_on():
    traffic = traffic_for({"tokens_per_s": 10.0})
    first, second = (add(traffic.scheduler, 20, tenant="t", max_len=21) for _ in range(2))
    traffic.step()
    assert first.finished
    assert traffic.step().slots == ()
    wake = traffic.scheduler.next_event()
    assert wake == pytest.approx(1.2, abs=0.1), "ten of its 21 tokens were in the bucket, and one must be in it"
    traffic.now = wake
    traffic.step()
    assert second.started == wake
    assert traffic.scheduler.next_event() == math.inf


def test_who_waits_for_an_adapter_and_not_for_tokens_says_no_time():
    traffic = traffic_for({"tokens_per_s": 10.0}, FakeAdapters(instant=False))
    add(traffic.scheduler, 5, "a", tenant="t")
    traffic.step()
    assert traffic.scheduler.next_event() == math.inf


def test_too_many_waiting_are_refused_and_nobody_else():
    traffic = traffic_for({"max_waiting": 2})
    traffic.scheduler.check("t", "", 2)
    add(traffic.scheduler, tenant="t")
    with pytest.raises(MultiloraError, match="too many waiting requests of tenant 't': max_waiting is 2") as caught:
        traffic.scheduler.check("t", "", 2)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    traffic.scheduler.check("u", "", 1000)
    traffic.step()
    traffic.scheduler.check("t", "", 2)


def test_who_may_use_which_adapter():
    traffic = traffic_for({"adapters": ["acme-*"]})
    for adapter in ("", "acme-1", "acme-1@3"):
        traffic.scheduler.check("t", adapter, 1)
    with pytest.raises(MultiloraError, match="lora_name: tenant 't' may not use 'other'") as caught:
        traffic.scheduler.check("t", "other@2", 1)
    assert caught.value.code is ErrorCode.INVALID_ARG
    traffic.scheduler.check("u", "other", 1)


def test_resident_bytes_stay_within_the_cap_and_its_adapters_take_turns():
    adapters = FakeAdapters(room=10)
    adapters.sizes = dict.fromkeys("abcdx", 10)
    traffic = traffic_for({"adapter_bytes": 25}, adapters)
    capped = [add(traffic.scheduler, 5, "abcd"[i % 4], tenant="t", max_len=65) for i in range(16)]
    other = [add(traffic.scheduler, 5, adapter, tenant="u", max_len=65) for adapter in "xyz"]
    while traffic.scheduler.has_work:
        traffic.step()
        assert sum(key in "abcd" for key in adapters.active) <= 2
        assert traffic.now < 60
    assert all(s.started is not None and s.started <= 1.0 for s in other)
    assert all(s.finished for s in capped)


def test_an_adapter_counts_for_the_tenant_that_asked_last():
    adapters = FakeAdapters(room=10)
    adapters.sizes = dict.fromkeys("abx", 10)
    traffic = traffic_for({"adapter_bytes": 20}, adapters)
    for adapter in "ab":
        add(traffic.scheduler, 5, adapter, tenant="t", max_len=6)
    while traffic.scheduler.has_work:
        traffic.step()
    add(traffic.scheduler, 5, "a", tenant="u", max_len=6)
    traffic.step()
    add(traffic.scheduler, 5, "x", tenant="t", max_len=6)
    traffic.step()
    assert sorted(adapters.active) == ["a", "b", "x"], "a is u's by now, so x fits beside b"


def test_adapters_of_unknown_size_come_one_at_a_time():
    """Any of them may be as large as the whole cap."""
    adapters = FakeAdapters(room=10, instant=False)
    adapters.sizes = dict.fromkeys("abcd", 0)
    traffic = traffic_for({"adapter_bytes": 25}, adapters)
    for key in "abcd":
        add(traffic.scheduler, 5, key, tenant="t", max_len=100)
    for _ in range(10):
        traffic.step()
        assert adapters.in_transit == ["a"]
    adapters.sizes["a"] = 20
    adapters.land()
    for _ in range(5):
        traffic.step()
    assert adapters.in_transit == ["b"]
    adapters.in_transit = []  # its load has failed
    for _ in range(5):
        traffic.step()
    assert adapters.in_transit, "somebody else's turn"


def test_an_adapter_beyond_the_cap_is_refused_as_soon_as_its_size_is_known():
    adapters = FakeAdapters()
    adapters.sizes = {"large": 26, "unknown": 0}
    traffic = traffic_for({"adapter_bytes": 25}, adapters)
    traffic.scheduler.check("t", "unknown", 1)
    traffic.scheduler.check("u", "large", 1)
    with pytest.raises(MultiloraError, match="lora_name: 'large' takes 26 bytes, and adapter_bytes of 't' is 25"):
        traffic.scheduler.check("t", "large", 1)


@given(
    st.dictionaries(st.text(min_size=1, max_size=2), st.integers(1, 9), max_size=5),
    st.integers(0, 9),
    st.integers(1, 20),
)
def test_what_has_to_go_for_one_more(held: dict[str, int], need: int, cap: int):
    idle = list(held)[: len(held) // 2]
    chosen = to_give_up(held, idle, need, cap)
    rest = sum(size for key, size in held.items() if key not in (chosen or []))
    if chosen is None:
        assert sum(held.values()) + need - sum(held[key] for key in idle) > cap
    else:
        assert set(chosen) <= set(idle)
        assert rest + need <= cap or rest == 0
        assert not chosen or rest + held[chosen[-1]] + need > cap, "no more than has to"


def test_buckets_and_a_clock_that_jumps():
    quota = Quota(Tenant("t", tokens_per_s=10.0, burst_tokens=20.0))
    assert quota.delay(5.0) == 0
    quota.charge(40, 5.0)
    assert quota.delay(5.0) == pytest.approx(2.1)
    assert quota.delay(-1000.0) == pytest.approx(2.1)
    assert quota.delay(-1000.0 + 2.1) == 0
    quota.charge(0, 1e9)
    assert quota.forgettable(1e9)
    quota.charge(20, 1e9)
    assert quota.delay(1e9) > 0, "a long pause saves up no more than the burst"
    assert Quota(Tenant("t", tokens_per_s=0.5)).delay(0.0) == 0, "of less than a token a second something is left too"


def test_names_of_tenants_come_from_clients_and_are_forgotten():
    traffic = traffic_for({"tokens_per_s": 1.0})
    for i in range(2000):
        sequence = add(traffic.scheduler, adapter="a", tenant=f"made up {i}", max_len=6)
        traffic.step()
        if not sequence.finished:
            traffic.scheduler.finish(sequence, FinishReason.ABORT)
    assert len(traffic.scheduler.lines._quotas) < 600
    assert len(traffic.scheduler.lines.accounts.root.children["standard"].children) < 600
    assert not traffic.scheduler.lines._lines
