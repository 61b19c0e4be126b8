# SPDX-License-Identifier: Apache-2.0
"""A scheduler in virtual time: adapters that are nowhere, a model that is not there, steps that take what we say."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable

from multilora_backend.adapters.state import AdapterState, Lease
from multilora_backend.core import FinishReason, SamplingParams, Sequence, StepPlan
from multilora_backend.scheduling.pages import PageTable
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.scheduler import Scheduler
from multilora_backend.scheduling.tenants import Tenants

FIRST_COME = Policy(adapter_first=False, fair_share=False, priority=False, preload=False)
_numbers = itertools.count()


class FakeAdapters:
    """`room` adapters fit; a load ends when `land()` is called, or at once with `instant`."""

    def __init__(self, room: int = 100, instant: bool = True, on_disk: Iterable[str] = ()) -> None:
        self.room = room
        self.instant = instant
        self.active: list[str] = []
        """Used least recently first."""
        self.in_transit: list[str] = []
        self.staying: set[str] = set()
        """Evicted for nobody, as the last copies of what somebody holds."""
        self.leases: Counter[str] = Counter()
        self.on_disk = set(on_disk)
        self.sizes: dict[str, int] = {}
        self.loads = 0
        self.prefetched: list[str] = []

    def request(self, key: str, protect: Collection[str] = ()) -> AdapterState:
        if key in self.active:
            return AdapterState.ACTIVE
        if key not in self.in_transit:
            if len(self.active) + len(self.in_transit) >= self.room:
                idle = [a for a in self.active if not self.leases[a] and a not in self.staying.union(protect)]
                if not idle:
                    return AdapterState.COLD
                self.active.remove(idle[0])
            self.in_transit.append(key)
            self.loads += 1
        if self.instant:
            self.land()
        return AdapterState.ACTIVE if self.instant else AdapterState.LOADING

    def waits_for_room(self, key: str) -> bool:
        return key not in self.active + self.in_transit

    def loading(self, key: str) -> bool:
        return key in self.in_transit

    def land(self) -> None:
        self.active += self.in_transit
        self.in_transit = []

    def lease(self, key: str) -> Lease | None:
        if key not in self.active:
            return None
        self.active.remove(key)
        self.active.append(key)
        self.leases[key] += 1
        return Lease(name=key, version=f"v-{key}", slot=0, rank_start=0, rank=8)

    def release(self, lease: Lease) -> None:
        self.leases[lease.name] -= 1
        assert self.leases[lease.name] >= 0

    def resident(self) -> Collection[str]:
        return list(self.active)

    def load_cost_s(self, key: str) -> float:
        return 0.0 if key in self.active else 0.05 if key in self.on_disk else 0.002

    def prefetch(self, key: str) -> None:
        self.prefetched.append(key)
        self.on_disk.discard(key)

    def device_bytes(self, key: str) -> tuple[int, bool]:
        size = self.sizes.get(key, 1)
        return size, size > 0 and key in self.active + self.in_transit

    def give_up(self, key: str) -> bool:
        if key not in self.active or self.leases[key] or key in self.staying:
            return False
        self.active.remove(key)
        return True


def make(
    *,
    num_pages: int = 100,
    page_size: int = 4,
    seqs: int = 8,
    tokens: int = 32,
    max_loras: int = 0,
    adapters: FakeAdapters | None = None,
    policy: Policy | None = None,
    caching: bool = True,
    tenants: Tenants | None = None,
) -> Scheduler:
    return Scheduler(
        PageTable(num_pages, page_size, caching),
        adapters or FakeAdapters(),
        policy or Policy(max_overtake_s=5.0),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_loras=max_loras,
        tenants=tenants or Tenants(),
    )


def add(scheduler: Scheduler, length: int = 5, adapter: str = "", arrival: float = 0.0, **kwargs) -> Sequence:
    number = next(_numbers)
    sequence = Sequence(
        key=("test", number, 0),
        prompt_len=length,
        token_ids=[number * 1000 + i for i in range(length)],
        sampling=SamplingParams(),
        seed=0,
        adapter=adapter,
        arrival=arrival,
        **kwargs,
    )
    scheduler.add(sequence)
    return sequence


def run(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    """One step: every slot that samples gets a token, and what has all of its tokens is still there."""
    plan = scheduler.schedule(now)
    scheduler.publish(plan)
    for slot in plan.slots:
        if slot.samples:
            slot.sequence.token_ids.append(1)
    return plan


def names(plan: StepPlan) -> list[str]:
    return [slot.sequence.adapter for slot in plan.slots]


class Traffic:
    """Plays arrivals to a scheduler: steps of `step_s`, each sequence ends at its own `max_len`."""

    def __init__(self, scheduler: Scheduler, step_s: float = 0.05) -> None:
        self.scheduler = scheduler
        self.step_s = step_s
        self.now = 0.0
        self.service: Counter[str] = Counter()
        """Weighted tokens, by tenant."""
        self.tokens = 0
        self.waits: dict[str, list[float]] = {}
        """Until the first step, by adapter."""
        self.adapters_max = 0

    def step(self) -> StepPlan:
        plan = run(self.scheduler, self.now)
        policy = self.scheduler.policy
        self.adapters_max = max(self.adapters_max, len(plan.adapters))
        for slot in plan.slots:
            sequence = slot.sequence
            if sequence.started == self.now and slot.start == 0:
                self.waits.setdefault(sequence.adapter, []).append(self.now - sequence.arrival)
                self.service[sequence.tenant] += policy.input_weight * sequence.prompt_len
            if slot.samples:
                self.tokens += 1
                self.service[sequence.tenant] += policy.output_weight
            if sequence.complete:
                self.scheduler.finish(sequence, FinishReason.LENGTH)
        self.now += self.step_s
        return plan
