# SPDX-License-Identifier: Apache-2.0
"""Who comes before whom for a slot, and what may be evicted for whom: cases that traffic seldom makes."""

from __future__ import annotations

import pytest

from multilora_backend.core import FinishReason, SequenceStatus
from multilora_backend.scheduling.handovers import AT_ONCE
from multilora_backend.scheduling.lines import line_of
from multilora_backend.scheduling.policy import LIGHTEST, Policy
from multilora_backend.scheduling.tenants import Tenants
from virtual_scheduler import FakeAdapters, Traffic, add, make, run

EAGER = Policy(tenure_s=0.1, max_overtake_s=0.0)


def test_who_waits_longer_gets_the_slot_though_its_victim_cannot_go_at_once():
    """The first one's victim is amid its prompt; what is freed for the second one is the first one's."""
    scheduler = make(max_loras=2, tokens=8, policy=EAGER)
    for _ in range(2):
        add(scheduler, 3, "busy", tenant="a", max_len=500)
    run(scheduler, 0.0)
    add(scheduler, 60, "amid", tenant="b", max_len=500)
    run(scheduler, 0.01)
    first, second = (add(scheduler, 3, name, at, tenant=name) for name, at in (("first", 0.02), ("second", 0.03)))
    now = 0.2
    while second.started is None:
        run(scheduler, now)
        if first.started is None:
            assert "second" not in scheduler.turns.holders
        now += 0.01
        assert now < 5
    assert first.started is not None
    assert first.started <= second.started


def test_what_waits_for_a_seat_is_not_evicted_for_what_is_not_due_however_many_that_is():
    adapters = FakeAdapters(room=2)
    scheduler = make(adapters=adapters, seqs=1, policy=Policy(max_overtake_s=100.0))
    add(scheduler, adapter="runs", max_len=1000)
    adapters.active.append("hot")
    run(scheduler)
    for i in range(20):
        add(scheduler, adapter=f"cold {i}", arrival=0.1)
    add(scheduler, adapter="hot", arrival=0.2)
    for step in range(5):
        run(scheduler, 0.3 + step)
    assert sorted(adapters.active) == ["hot", "runs"]


class Unprefetched(FakeAdapters):
    """The host has no room, so nothing comes of a prefetch."""

    def prefetch(self, key: str) -> None:
        self.prefetched.append(key)


def test_room_goes_to_what_the_host_has_rather_than_wait_for_the_disk():
    adapters = Unprefetched(room=1, on_disk=["far"])
    scheduler = make(adapters=adapters, policy=Policy(tenure_s=100.0, max_overtake_s=10.0))
    hot = add(scheduler, adapter="hot", max_len=1000)
    run(scheduler)
    far, near = add(scheduler, adapter="far", arrival=0.1), add(scheduler, adapter="near", arrival=0.2)
    run(scheduler, 0.3)
    scheduler.finish(hot, FinishReason.ABORT)
    run(scheduler, 0.4)
    run(scheduler, 0.5)
    assert near.started is not None
    assert far.started is None


def test_but_nobody_waits_for_the_disk_for_ever():
    adapters = Unprefetched(room=1, on_disk=["far"])
    scheduler = make(adapters=adapters, policy=Policy(tenure_s=1.0, max_overtake_s=0.5), num_pages=1000)
    hot = add(scheduler, adapter="hot", max_len=900)
    add(scheduler, adapter="far", max_len=900)
    for step in range(15):
        run(scheduler, step / 10)
    assert hot.status is SequenceStatus.RUNNING
    run(scheduler, 1.6)
    assert hot.status is SequenceStatus.PAUSED


def test_adapters_of_a_tenant_at_its_cap_of_bytes_take_turns():
    adapters = FakeAdapters(room=10)
    adapters.sizes = dict.fromkeys("abc", 10)
    tenants = Tenants.parse({"tenants": {"t": {"adapter_bytes": 25}}})
    policy = Policy(tenure_s=1.0, max_overtake_s=0.5)
    traffic = Traffic(make(num_pages=4000, adapters=adapters, tenants=tenants, policy=policy))
    live = [add(traffic.scheduler, 5, key, tenant="t", max_len=3000) for key in "abc"]
    while traffic.now < 10:
        traffic.step()
        assert len(adapters.active) <= 2
    assert all(s.num_output_tokens > 20 for s in live)


def test_an_idle_adapter_goes_for_one_more_though_an_older_one_runs():
    adapters = FakeAdapters(room=10)
    adapters.sizes = dict.fromkeys("abcdefgh", 10)
    tenants = Tenants.parse({"tenants": {"t": {"adapter_bytes": 25}}})
    policy = Policy(tenure_s=100.0, max_overtake_s=0.5)
    traffic = Traffic(make(num_pages=1000, adapters=adapters, tenants=tenants, policy=policy))
    runs = add(traffic.scheduler, 5, "a", tenant="t", max_len=900)
    traffic.step()
    add(traffic.scheduler, 5, "b", tenant="t", max_len=6)
    for _ in range(3):
        traffic.step()
    more = add(traffic.scheduler, 5, "c", traffic.now, tenant="t", max_len=6)
    for _ in range(4):
        traffic.step()
    assert more.finished
    assert runs.status is SequenceStatus.RUNNING
    for key in "bcdefgh":
        add(traffic.scheduler, 5, key, traffic.now, tenant="t", max_len=6)
        for _ in range(3):
            traffic.step()
    assert len(traffic.scheduler.turns._ledger._owner) <= 3, "nobody counts what has been evicted"


def test_what_has_run_comes_before_what_has_not_in_its_line():
    scheduler = make(seqs=1)
    first = add(scheduler)
    run(scheduler)
    second = add(scheduler)
    scheduler._sequences.preempt(first)
    assert line_of(first).head is first
    run(scheduler)
    assert first.status is SequenceStatus.RUNNING
    assert second.status is SequenceStatus.WAITING


def test_a_deadline_behind_a_paused_sequence_counts_for_the_slot():
    scheduler = make(max_loras=1, policy=Policy(tenure_s=0.1, max_overtake_s=5.0))
    paused = add(scheduler, adapter="a", max_len=900)
    run(scheduler, 0.0)
    add(scheduler, adapter="b", arrival=0.0, max_len=900)
    run(scheduler, 5.1)
    assert paused.status is SequenceStatus.PAUSED
    assert line_of(paused).due == pytest.approx(10.1)
    add(scheduler, adapter="a", arrival=5.2, deadline=6.0)
    assert line_of(paused).due == 6.0


@pytest.mark.parametrize(("priority", "due"), [(True, 3.0), (False, 6.0)])
def test_deadlines_are_a_part_of_the_priority_strategy(priority: bool, due: float):
    scheduler = make(policy=Policy(priority=priority, max_overtake_s=5.0))
    line = line_of(add(scheduler, adapter="a", arrival=1.0, deadline=3.0))
    assert line.due == due
    other = line_of(add(scheduler, adapter="b", arrival=0.5))
    ranks = [scheduler.policy.rank(each, 2.9) for each in (line, other)]
    assert (ranks[0] < ranks[1]) is priority


def test_no_class_is_so_light_that_it_is_overtaken_without_bound():
    tenants = Tenants.parse({"classes": {"dust": {"weight": 1e-6}}, "default": {"class": "dust"}})
    line = line_of(add(make(tenants=tenants), adapter="a", arrival=1.0))
    assert line.due == 1.0 + 5.0 / LIGHTEST


def test_a_clock_that_goes_back_stands_still():
    scheduler = make()
    run(scheduler, 10.0)
    sequence = add(scheduler, arrival=9.0)
    run(scheduler, 3.0)
    assert sequence.started == 10.0


def test_a_step_gives_up_a_few_slots_at_most():
    scheduler = make(max_loras=8, seqs=8, num_pages=1000, policy=EAGER)
    for name in [*(f"a{i}" for i in range(8)), *(f"b{i}" for i in range(8))]:
        add(scheduler, adapter=name, max_len=500)
    run(scheduler, 0.0)
    run(scheduler, 0.05)
    run(scheduler, 1.0)
    assert scheduler.turns.handovers == AT_ONCE


@pytest.mark.parametrize("promised", [False, True])
def test_for_a_cap_of_bytes_a_tenant_gives_up_its_own_slot(promised: bool):
    scheduler = make(max_loras=2, policy=EAGER)
    for name, tenant in (("other", "u"), ("own", "t"), ("own", "t")):
        add(scheduler, adapter=name, tenant=tenant, max_len=500)
    run(scheduler, 0.0)
    line = line_of(add(scheduler, adapter="more", tenant="t", arrival=0.0))
    handovers = scheduler.turns._handovers
    scheduler.turns.holders["other"].closing = promised
    handovers.open(1.0)
    assert handovers.choose(line, 9.0, seats=True, own=True) is scheduler.turns.holders["own"]
    scheduler.turns.holders["own"].closing = False
    handovers.open(1.0)
    assert handovers.choose(line, 9.0, seats=True, own=False) is scheduler.turns.holders["other"]


def test_what_has_begun_is_not_urgent_any_more():
    scheduler = make()
    sequence = add(scheduler, deadline=1.0)
    line = line_of(sequence)
    assert scheduler.policy.line_rank(line, 0.9)[0] is False
    run(scheduler)
    scheduler._sequences.preempt(sequence)
    assert scheduler.policy.line_rank(line, 0.9)[0] is True
