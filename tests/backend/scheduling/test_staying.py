# SPDX-License-Identifier: Apache-2.0
"""Adapters that cannot be evicted before their sequences have ended: they go on, and who needs their room waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_bench import Bench
from multilora_backend.core import Sequence
from multilora_backend.scheduling.policy import Policy
from virtual_scheduler import FakeAdapters, Traffic, add, make

POLICY = Policy(tenure_s=0.2, max_overtake_s=0.1)


def traffic_for(room: int, max_loras: int = 0, seqs: int = 8, policy: Policy = POLICY) -> Traffic:
    adapters = FakeAdapters(room)
    scheduler = make(num_pages=1000, seqs=seqs, adapters=adapters, max_loras=max_loras, policy=policy)
    return Traffic(scheduler, step_s=0.05)


def retire(traffic: Traffic, key: str) -> None:
    """Its revision is replaced, and nothing but the device has it."""
    adapters = traffic.scheduler._sequences._adapters
    assert key in adapters.active
    adapters.staying.add(key)


@pytest.mark.parametrize("max_loras", [0, 1])
@pytest.mark.parametrize("paused", [False, True])
def test_what_stays_ends_before_what_needs_its_room(paused: bool, max_loras: int):
    traffic = traffic_for(1, max_loras)
    stays = add(traffic.scheduler, adapter="stays", max_len=60)
    traffic.step()
    traffic.step()
    if paused:
        assert traffic.scheduler._sequences.pause(traffic.scheduler.turns.holders["stays"], 99.0)
    retire(traffic, "stays")
    others = [add(traffic.scheduler, adapter=f"a{i}", arrival=traffic.now, max_len=10) for i in range(12)]
    while not stays.finished:
        traffic.step()
        assert traffic.now < 10
        assert all(s.started is None for s in others)
    assert traffic.scheduler.pauses > 0
    traffic.scheduler._sequences._adapters.staying.clear()
    while traffic.scheduler.has_work:
        traffic.step()
        assert traffic.now < 30


@pytest.mark.parametrize("used", [False, True])
def test_what_fits_beside_it_has_its_turns_meanwhile(used: bool):
    """Whether something runs with what stays or not: an alias may keep it, for one."""
    traffic = traffic_for(3)
    traffic.scheduler._sequences._adapters.request("stays")
    retire(traffic, "stays")
    live = [add(traffic.scheduler, adapter=f"a{i}", max_len=1000) for i in range(5)]
    live += [add(traffic.scheduler, adapter="stays", max_len=1000)] if used else []
    while traffic.now < 20:
        traffic.step()
    assert min(s.num_output_tokens for s in live) > 50


class Served:
    """A scheduler over a real manager, whose host keeps nothing, or all if it has room."""

    def __init__(self, ranks: dict[str, int], max_loras: int = 0, policy: Policy = POLICY, **settings) -> None:
        self.bench = Bench(ranks, ranks=24, watched=True, **settings)
        self.manager = self.bench.manager
        self.manager.check_all()
        self.bench.settle()
        scheduler = make(num_pages=1000, adapters=self.manager, max_loras=max_loras, policy=policy)
        self.traffic = Traffic(scheduler, step_s=0.05)
        self.live: list[Sequence] = []

    def submit(self, name: str, tokens: int) -> Sequence:
        key = self.manager.resolve(name)
        self.manager.hold(key)
        self.live.append(add(self.traffic.scheduler, 3, key, self.traffic.now, max_len=3 + tokens))
        return self.live[-1]

    def replace(self, name: str) -> None:
        self.manager.unload(name)
        self.manager.load(name)

    def step(self) -> None:
        self.bench.clock.now = self.traffic.now
        self.bench.loader.run()
        assert not self.manager.poll().failed
        self.traffic.step()
        for sequence in [s for s in self.live if s.finished]:
            self.live.remove(sequence)
            self.manager.drop(sequence.adapter)


RANKS = {"a": 24, "b": 16, "c": 8, "d": 3}


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0, 2, 30, 90]), st.integers(0, 8)), max_size=20),
    st.sampled_from([0, 1, 2]),
)
def test_everybody_ends_whatever_is_replaced_and_when(happens: list[tuple[str, int, int]], max_loras: int):
    """Requests of so many tokens, with 0 a new revision, each so many steps after the one before it."""
    served = Served(RANKS, max_loras, host_bytes=0)
    for name, tokens, steps in happens:
        for _ in range(steps):
            served.step()
        if tokens:
            served.submit(name, tokens)
        else:
            served.replace(name)
    end = served.traffic.now + 120
    while served.live:
        served.step()
        assert served.traffic.now < end, "somebody starved"


def test_nobody_takes_the_room_of_who_is_overdue_while_that_is_only_being_loaded():
    served = Served({"first": 8, "wide": 24, "later": 8}, policy=Policy(tenure_s=0.2, max_overtake_s=0.0), hold=True)
    for name in ("first", "wide", "later"):
        served.manager.prefetch(name)
        served.bench.settle(1)
    first, wide, later = (served.submit(name, 90) for name in ("first", "wide", "later"))
    for _ in range(4):
        served.step()  # what is copied to the device does not arrive
    assert served.manager.loading("first")
    while not wide.started:
        served.bench.arrive()
        served.step()
        assert served.traffic.now < 5
    assert first.started
    assert not later.started
