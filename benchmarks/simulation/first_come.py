# SPDX-License-Identifier: Apache-2.0
"""What the scheduler is compared with: first come, first served, and a load that the step loop waits for.

Sequences that run go on; then the oldest whose adapter runs already, or finds a slot, is admitted, as far as tokens,
pages and sequences reach. It has the same pages, adapter manager, host cache, eviction and machine as the scheduler.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque

from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import FinishReason, Sequence, SequenceStatus, Slot, StepPlan
from multilora_backend.scheduling.pages import PageTable


class FirstComeScheduler:
    """The part of `Scheduler`'s surface that a simulation uses. Its machine must be a blocking one."""

    def __init__(
        self,
        pages: PageTable,
        adapters: AdapterManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_loras: int = 0,
    ) -> None:
        """`max_loras` 0: as many as the pool holds."""
        self.pages = pages
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_loras = max_loras
        self.running: dict[tuple[str, int, int], Sequence] = {}
        self.preemptions = 0
        self._waiting: dict[str, deque[Sequence]] = {}
        self._heads: list[tuple[float, str]] = []
        """Heap of (arrival, adapter) of all first ones; those that are none any more are dropped when they come up."""
        self._running_adapters: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        queue = self._waiting.setdefault(sequence.adapter, deque())
        queue.append(sequence)
        if len(queue) == 1:
            self._announce(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._stop(sequence)
        sequence.transition(SequenceStatus.FINISHED, reason)

    def schedule(self, now: float) -> StepPlan:
        budget = self.max_num_batched_tokens
        slots: list[Slot] = []
        preempted: list[Sequence] = []
        queue = deque(self.running.values())
        while queue and budget:
            sequence = queue.popleft()
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            while not self.pages.extend(sequence, sequence.num_computed + count):
                victim = queue.pop() if queue else sequence
                self._preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
            else:
                slots.append(_advance(sequence, count))
                budget -= count
        if not preempted:
            slots += self._admit(budget)
        return StepPlan(tuple(slots), tuple(preempted))

    def publish(self, plan: StepPlan) -> None:
        """There is no prefix cache in a simulation: prompts have nothing in common."""

    def _admit(self, budget: int) -> list[Slot]:
        slots: list[Slot] = []
        full = False
        while budget and len(self.running) < self.max_num_seqs:
            sequence = self._oldest(full)
            if sequence is None:
                break
            if sequence.adapter and not self._lease(sequence):
                full = True  # no slot for this one, so for no other adapter that does not run
                continue
            count = min(sequence.num_tokens, budget)
            if not self.pages.extend(sequence, count):
                self._give_back(sequence)
                break
            queue = self._waiting[sequence.adapter]
            queue.popleft()
            if queue:
                self._announce(queue[0])
            else:
                del self._waiting[sequence.adapter]
            self.running[sequence.key] = sequence
            if sequence.adapter:
                self._running_adapters[sequence.adapter] += 1
            sequence.transition(SequenceStatus.RUNNING)
            slots.append(_advance(sequence, count))
            budget -= count
        return slots

    def _oldest(self, full: bool) -> Sequence | None:
        """`full`: of the base model and the adapters that run."""
        if full:
            queues = [self._waiting[name] for name in ("", *self._running_adapters) if name in self._waiting]
            return min((queue[0] for queue in queues), key=lambda s: s.arrival, default=None)
        while self._heads:
            arrival, adapter = self._heads[0]
            queue = self._waiting.get(adapter)
            if queue and queue[0].arrival == arrival:
                return queue[0]
            heapq.heappop(self._heads)
        return None

    def _announce(self, head: Sequence) -> None:
        heapq.heappush(self._heads, (head.arrival, head.adapter))

    def _lease(self, sequence: Sequence) -> bool:
        """Waits for the load, on a blocking machine; False if no slot is free."""
        used = self._running_adapters
        if self.max_loras and sequence.adapter not in used and len(used) >= self.max_loras:
            return False
        state = self.adapters.request(sequence.adapter, used)
        while state is AdapterState.LOADING:
            self.adapters.poll()
            state = self.adapters.request(sequence.adapter, used)
        sequence.lease = self.adapters.lease(sequence.adapter)
        return sequence.lease is not None

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.transition(SequenceStatus.WAITING)
        self._waiting.setdefault(sequence.adapter, deque()).appendleft(sequence)
        self._announce(sequence)
        self.preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        del self.running[sequence.key]
        if sequence.adapter:
            self._running_adapters[sequence.adapter] -= 1
            if not self._running_adapters[sequence.adapter]:
                del self._running_adapters[sequence.adapter]
        self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pages.release(sequence)
        if sequence.lease is not None:
            self.adapters.release(sequence.lease)
            sequence.lease = None


def _advance(sequence: Sequence, count: int) -> Slot:
    start = sequence.num_computed
    sequence.num_computed += count
    return Slot(sequence, start, count, samples=sequence.num_computed == sequence.num_tokens)
