# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: which sequences run in the next step, and how many tokens of each.

A step serves, within its token budget: one token of every sequence that decodes, then further chunks of
prompts in progress, then newly admitted sequences. When pages run out, the sequences that are last in that
order give theirs back and are computed again later (preemption by recompute).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import FinishReason, Sequence, SequenceStatus, Slot, StepPlan
from multilora_backend.scheduling.pages import PageTable
from multilora_backend.scheduling.policy import Policy, Snapshot

if TYPE_CHECKING:
    from multilora_backend.adapters.manager import Lease


class Adapters(Protocol):
    """What the scheduler needs of the adapter manager. Nothing here may block."""

    def request(self, name: str, protect: Collection[str] = ()) -> AdapterState:
        """Asks for an adapter to become ACTIVE. Room is never made by evicting one of `protect`."""
        ...

    def waits_for_room(self, name: str) -> bool:
        """True if the adapter cannot be loaded before leases of others are given back."""
        ...

    def lease(self, name: str) -> Lease | None: ...

    def release(self, lease: Lease) -> None: ...

    def resident(self) -> Collection[str]:
        """Names of the ACTIVE adapters."""
        ...


class Scheduler:
    """Owns every sequence from `add` to `finish`. One thread; time comes in as an argument."""

    # Waiting sequences looked at in a step: admission stays O(1) in the length of a long queue.
    LOOKAHEAD = 1024

    def __init__(
        self,
        pages: PageTable,
        adapters: Adapters,
        policy: Policy,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_loras: int = 0,
    ) -> None:
        """`max_loras` bounds the different adapters in one step; 0 is no bound."""
        self.pages = pages
        self.adapters = adapters
        self.policy = policy
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_loras = max_loras
        self.waiting: dict[tuple[str, int, int], Sequence] = {}
        self.running: dict[tuple[str, int, int], Sequence] = {}
        self.preemptions = 0
        self._running_adapters: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def find(self, key: tuple[str, int, int]) -> Sequence | None:
        return self.running.get(key) or self.waiting.get(key)

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence.key] = sequence

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence in any state and takes back what it holds."""
        if sequence.status is SequenceStatus.RUNNING:
            self._stop_running(sequence)
        else:
            del self.waiting[sequence.key]
        sequence.transition(SequenceStatus.FINISHED, reason)

    def waiting_for(self, adapter: str) -> list[Sequence]:
        return [s for s in self.waiting.values() if s.adapter == adapter]

    def schedule(self, now: float) -> StepPlan:
        """Plans the next step. Computed tokens are counted here, before they are computed."""
        slots, preempted, budget = self._continue_running()
        if not preempted and budget > 0 and self.waiting:
            slots += self._admit(budget, now)
        return StepPlan(tuple(slots), tuple(preempted))

    def publish(self, plan: StepPlan) -> None:
        """After a step: what it computed can be found by other sequences."""
        for slot in plan.slots:
            if slot.sequence.status is SequenceStatus.RUNNING:
                self.pages.publish(slot.sequence, _root(slot.sequence))

    def _continue_running(self) -> tuple[list[Slot], list[Sequence], int]:
        budget = self.max_num_batched_tokens
        slots: list[Slot] = []
        preempted: list[Sequence] = []
        # Stable sort: within a class the order of admission stays, so the newest is preempted first.
        # Without those whose last token is on its way: nothing is left to compute, and their pages come back anyway.
        queue = deque(
            sorted(
                (s for s in self.running.values() if not s.complete),
                key=lambda s: (s.num_tokens - s.num_computed > 1, -s.priority),
            )
        )
        while queue and budget > 0:
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
        return slots, preempted, budget

    def _admit(self, budget: int, now: float) -> list[Slot]:
        slots: list[Slot] = []
        snapshot = Snapshot(now, self.adapters.resident())
        # An overdue sequence that found no adapter slot reserves the next one: until then only sequences of the
        # base model are admitted, so running adapters drain instead of being refilled forever.
        draining = False
        soon: set[str] = set(self._running_adapters)
        for sequence in self.policy.order(self.waiting.values(), snapshot)[: self.LOOKAHEAD]:
            if budget == 0 or len(self.running) >= self.max_num_seqs:
                break
            if sequence.adapter:
                if draining:
                    continue  # not even a request: it could take the room that is being drained for
                state = self._request(sequence, soon)
                soon.add(sequence.adapter)
                no_slot = self.adapters.waits_for_room(sequence.adapter) or self._batch_full(sequence)
                draining |= no_slot and self.policy.overdue(sequence, snapshot)
                if no_slot or state is not AdapterState.ACTIVE:
                    continue
                sequence.lease = self.adapters.lease(sequence.adapter)
            self.pages.admit(sequence, _root(sequence))
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            if not self.pages.extend(sequence, sequence.num_computed + count):
                self._give_back(sequence)
                break
            del self.waiting[sequence.key]
            self.running[sequence.key] = sequence
            self._running_adapters.update([sequence.adapter] if sequence.adapter else [])
            sequence.transition(SequenceStatus.RUNNING)
            slots.append(_advance(sequence, count))
            budget -= count
        return slots

    def _request(self, sequence: Sequence, protect: Collection[str]) -> AdapterState:
        state = self.adapters.request(sequence.adapter, protect)
        if state is not AdapterState.ACTIVE and sequence.status is SequenceStatus.WAITING:
            sequence.transition(SequenceStatus.WAITING_ADAPTER)
        return state

    def _batch_full(self, sequence: Sequence) -> bool:
        """True if one more adapter in the batch would exceed max_loras."""
        used = self._running_adapters
        return bool(self.max_loras) and sequence.adapter not in used and len(used) >= self.max_loras

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.transition(SequenceStatus.WAITING)
        self.waiting[sequence.key] = sequence
        self.preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[sequence.key]
        if sequence.adapter:
            self._running_adapters[sequence.adapter] -= 1
            self._running_adapters += Counter()  # drops the names that reached zero
        self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pages.release(sequence)
        if sequence.lease is not None:
            self.adapters.release(sequence.lease)
            sequence.lease = None


def _root(sequence: Sequence) -> bytes:
    """The adapter version that a sequence's KV depends on; empty for the base model."""
    return sequence.lease.version.encode() if sequence.lease is not None else b""


def _advance(sequence: Sequence, count: int) -> Slot:
    start = sequence.num_computed
    sequence.num_computed += count
    return Slot(sequence, start, count, samples=sequence.num_computed == sequence.num_tokens)
