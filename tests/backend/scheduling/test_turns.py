# SPDX-License-Identifier: Apache-2.0
"""Time-slicing in virtual time: more adapters than slots, and nobody starves, recomputes or waits in vain."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection

import pytest

from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import FinishReason, SequenceStatus
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.tenants import Tenants
from virtual_scheduler import FakeAdapters, Traffic, add, make, names, run

SLOTS = [{"max_loras": 3}, {"adapters": 3}]
STEP_S = 0.05


def traffic_for(bound: dict, seqs: int = 24, pages: int = 2000, tenants: Tenants | None = None, **policy) -> Traffic:
    adapters = FakeAdapters(room=bound.get("adapters", 100))
    scheduler = make(
        num_pages=pages,
        page_size=16,
        seqs=seqs,
        tokens=512,
        max_loras=bound.get("max_loras", 0),
        adapters=adapters,
        policy=Policy(**{"tenure_s": 1.0, "max_overtake_s": 1.0, **policy}),
        tenants=tenants,
    )
    return Traffic(scheduler, STEP_S)


def play(traffic: Traffic, weights: list[float], load: float, seconds: float, seed: int = 0) -> dict[str, float]:
    """p99 wait by adapter. A full batch of 24 serves 24 tokens a step, so 16 requests of 30 tokens a second."""
    draw = random.Random(seed)
    rate = load * 24 / STEP_S / 30
    due = 0.0
    sent: Counter[str] = Counter()
    while traffic.now < seconds or traffic.scheduler.has_work:
        while due <= traffic.now and due < seconds:
            adapter = f"a{draw.choices(range(len(weights)), weights)[0]}"
            sent[adapter] += 1
            add(traffic.scheduler, 10, adapter, due, max_len=40)
            due += draw.expovariate(rate)
        traffic.step()
        assert traffic.now < 20 * seconds, "somebody starved"
    assert {a: len(w) for a, w in traffic.waits.items()} == sent
    assert traffic.adapters_max <= 3
    return {adapter: sorted(waits)[int(0.99 * len(waits))] for adapter, waits in traffic.waits.items()}


@pytest.mark.parametrize("bound", SLOTS, ids=str)
def test_six_adapters_on_three_slots_beyond_capacity_wait_alike(bound: dict):
    waits = sorted(play(traffic_for(bound), [1] * 6, 1.5, 60).values())
    assert waits[-1] <= 1.5 * waits[2]


@pytest.mark.parametrize("bound", SLOTS, ids=str)
def test_fifteen_adapters_on_three_slots_below_capacity_wait_alike(bound: dict):
    waits = sorted(play(traffic_for(bound), [12] * 5 + [6] * 5 + [2] * 5, 0.8, 240).values())
    assert waits[-1] <= 1.5 * waits[7]


def test_who_floods_does_not_keep_others_from_their_turns():
    traffic = traffic_for({"max_loras": 2})
    for i in range(4):
        for _ in range(400):
            add(traffic.scheduler, 10, f"flood {i}", max_len=40)
    for _ in range(400):
        traffic.step()
    late = add(traffic.scheduler, 10, "late", traffic.now, max_len=40)
    while late.started is None:
        traffic.step()
    assert late.started - late.arrival <= 8.0, "the overtaking, and patience for each slot"


def test_paused_sequences_keep_their_pages_and_go_on_where_they_were():
    traffic = traffic_for({"max_loras": 1})
    first = add(traffic.scheduler, 40, "a", max_len=400)
    traffic.step()
    second = add(traffic.scheduler, 40, "b", max_len=400)
    seen = Counter()
    while first.status is not SequenceStatus.FINISHED or second.status is not SequenceStatus.FINISHED:
        before = {s: s.num_computed for s in (first, second)}
        plan = traffic.step()
        assert len(plan.adapters) == 1
        for slot in plan.slots:
            assert slot.start == before[slot.sequence], "nothing is computed twice"
        seen.update(s.status for s in (first, second))
    assert seen[SequenceStatus.PAUSED] > 50
    assert traffic.scheduler.preemptions == 0
    assert traffic.scheduler.pauses > 10
    assert traffic.scheduler.pages.num_free == traffic.scheduler.pages.num_pages - 1


def test_when_pages_are_short_adapters_drain_first_and_everything_ends():
    """Two adapters of which each would fill the pages: pausing the one leaves nothing for the other."""
    traffic = traffic_for({"max_loras": 1}, seqs=8, pages=40)
    live = [add(traffic.scheduler, 20, f"a{i % 2}", max_len=120) for i in range(24)]
    while any(not s.finished for s in live):
        traffic.step()
        assert traffic.now < 300
        traffic.scheduler.pages.check()
    assert not traffic.scheduler.paused


def test_pages_of_paused_sequences_go_before_those_of_running_ones():
    traffic = traffic_for({"max_loras": 1}, pages=30)
    paused = add(traffic.scheduler, 100, "a", max_len=400)
    traffic.step()
    running = add(traffic.scheduler, 100, "b", max_len=400)
    while running.status is not SequenceStatus.RUNNING:
        traffic.step()
    assert paused.status is SequenceStatus.PAUSED
    assert len(paused.pages) > 6
    traffic.scheduler.policy.__dict__["tenure_s"] = 1e9
    while paused.pages and traffic.now < 60:
        traffic.step()
    assert paused.status is SequenceStatus.WAITING
    assert not traffic.scheduler.paused
    assert running.status is SequenceStatus.RUNNING
    while not running.finished or not paused.finished:
        traffic.step()
        assert traffic.now < 120


def test_the_base_model_needs_no_slot():
    traffic = traffic_for({"max_loras": 1})
    for i in range(4):
        add(traffic.scheduler, 10, f"a{i}", max_len=1000)
    traffic.step()
    base = add(traffic.scheduler, 10, "", traffic.now, max_len=40)
    assert "" in names(traffic.step())
    while not base.finished:
        assert "" in names(traffic.step())


def test_an_adapter_on_the_disk_is_read_before_another_one_makes_room():
    adapters = FakeAdapters(room=1, on_disk=["cold"])
    adapters.prefetch = adapters.prefetched.append  # type: ignore[method-assign]  # it takes its time
    scheduler = make(adapters=adapters, policy=Policy(tenure_s=1.0, max_overtake_s=0.5), num_pages=1000)
    hot, cold = add(scheduler, adapter="hot", max_len=900), add(scheduler, adapter="cold", max_len=900)
    run(scheduler, 0.0)
    run(scheduler, 1.2)
    run(scheduler, 1.3)
    assert "cold" in adapters.prefetched
    assert hot.status is SequenceStatus.RUNNING
    adapters.on_disk.clear()
    run(scheduler, 1.4)
    assert hot.status is SequenceStatus.PAUSED
    run(scheduler, 1.5)
    assert cold.status is SequenceStatus.RUNNING


class SlowSource(FakeAdapters):
    """Adapters whose names begin with "slow" are on their way for ever, from another machine, say."""

    def request(self, key: str, protect: Collection[str] = ()) -> AdapterState:
        return AdapterState.LOADING if self.loading(key) else super().request(key, protect)

    def waits_for_room(self, key: str) -> bool:
        return not self.loading(key) and super().waits_for_room(key)

    def loading(self, key: str) -> bool:
        return key.startswith("slow") or super().loading(key)


@pytest.mark.parametrize("max_loras", [0, 2])
def test_slow_loads_hold_up_nobody_else_however_many(max_loras: int):
    scheduler = make(adapters=SlowSource(), max_loras=max_loras)
    slow = [add(scheduler, adapter=f"slow {i}", tenant=f"t{i % 3}") for i in range(20)]
    fast = add(scheduler, adapter="fast", arrival=1.0, tenant="t0")
    for i in range(3):
        run(scheduler, 1.0 + i)
    assert fast.started is not None
    assert scheduler.turns.wanted
    assert len(scheduler.turns._loading) == 20
    for sequence in [*slow, fast]:
        scheduler.finish(sequence, FinishReason.ABORT)
    assert not scheduler.turns._loading


def test_what_has_been_loaded_gets_its_slot_with_others_that_wait_for_it():
    adapters = FakeAdapters(instant=False)
    scheduler = make(adapters=adapters)
    live = [add(scheduler, adapter="a", tenant=tenant) for tenant in ("t", "u")]
    for now in (0.0, 0.1, 0.2):
        assert not run(scheduler, now).slots
    adapters.land()
    assert len(run(scheduler, 0.3).slots) == 2
    assert all(s.status is SequenceStatus.RUNNING for s in live)
    assert not scheduler.turns._loading


def test_slots_that_turn_over_by_themselves_are_taken_from_nobody():
    """Requests shorter than the tenure, each of another adapter: to pause one would only load it again."""
    traffic = traffic_for({"adapters": 3}, tenure_s=2.0, max_overtake_s=0.5)
    for i in range(200):
        add(traffic.scheduler, 4, f"a{i}", max_len=34)
    while traffic.scheduler.has_work:
        traffic.step()
    assert traffic.scheduler.pauses == 0
    assert traffic.scheduler._sequences._adapters.loads == 200


def test_tenants_share_the_slots():
    traffic = traffic_for({"max_loras": 4})
    for i in range(20):
        for _ in range(100):
            add(traffic.scheduler, 10, f"many {i}", tenant="many", max_len=40)
    for _ in range(100):
        traffic.step()
    for i in range(2):
        for _ in range(100):
            add(traffic.scheduler, 10, f"few {i}", traffic.now, tenant="few", max_len=40)
    held: Counter[str] = Counter()
    for step in range(200):
        traffic.step()
        if step >= 100:
            held.update(turn.tenant for turn in traffic.scheduler.turns.holders.values())
    assert held["few"] >= 0.6 * held["many"], "two adapters of it against twenty"


def test_an_adapter_that_is_aborted_out_of_its_turn_leaves_nothing():
    traffic = traffic_for({"max_loras": 1})
    live = [add(traffic.scheduler, 10, f"a{i % 3}", max_len=1000) for i in range(9)]
    for step in range(200):
        traffic.step()
        if step % 20 == 19 and live:
            traffic.scheduler.finish(live.pop(), FinishReason.ABORT)
    assert not traffic.scheduler.has_work
    assert not traffic.scheduler.turns.wanting
    traffic.step()
    assert not traffic.scheduler.turns._left
    assert not traffic.scheduler.turns.holders
    assert traffic.scheduler.pages.num_free == traffic.scheduler.pages.num_pages - 1
