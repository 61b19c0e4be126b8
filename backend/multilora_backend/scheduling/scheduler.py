# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: which sequences run in the next step, and how many tokens of each.

A step serves, within its token budget: one token of every sequence that decodes, then further chunks of prompts in
progress, then newly admitted sequences. Which adapters take part is decided before that (`scheduling.turns`).

Two things stop a running sequence. When its adapter is turned out it is *paused*: it gives its lease back and keeps
its pages, so that going on costs nothing. When pages run out they are taken from paused sequences first, the newest
pause first, then from the running ones that are last in the order of service (*preempted*); what has lost its pages
has them moved to the host (`scheduling.host`) or is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator

from multilora_backend.core import FinishReason, Sequence, Slot, StepPlan, adapter_name
from multilora_backend.errors import invalid
from multilora_backend.scheduling.batch import advance, decode, in_order, take_victim
from multilora_backend.scheduling.host import HostPages
from multilora_backend.scheduling.interface import Adapters
from multilora_backend.scheduling.lines import Key, Line
from multilora_backend.scheduling.pages import PageTable
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.preload import Preloader
from multilora_backend.scheduling.ready import Ready
from multilora_backend.scheduling.sequences import Sequences
from multilora_backend.scheduling.tenants import Tenants

NO_TENANTS = Tenants()


class Scheduler:
    """Owns every sequence from `add` to `finish`. One thread; time comes in as an argument."""

    def __init__(
        self,
        pages: PageTable,
        adapters: Adapters,
        policy: Policy,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_loras: int = 0,
        tenants: Tenants = NO_TENANTS,
        host: HostPages | None = None,
    ) -> None:
        """`max_loras` bounds the different adapters in one step; 0 is no bound. Without `host` no page is moved."""
        self.pages = pages
        self.policy = policy
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_loras = max_loras
        self.host = host or HostPages(0, 0)
        self._sequences = Sequences(pages, self.host, adapters, policy, tenants, max_loras)
        self._memory = self._sequences.memory
        self._adapters = adapters
        self._preloader = Preloader(adapters, policy.preload)
        self._now = 0.0
        self.lines, self.turns = self._sequences.lines, self._sequences.turns
        self.waiting: dict[Key, Sequence] = self._sequences.waiting
        """What does not run: new, preempted and paused."""
        self.running: dict[Key, Sequence] = self._sequences.running
        """In order of admission."""
        self.paused: dict[Key, Sequence] = self._memory.paused
        """Those of the waiting ones that were paused and still hold their pages, oldest pause first."""

    @property
    def preemptions(self) -> int:
        """How often a sequence lost its pages."""
        return self._memory.losses

    @property
    def pauses(self) -> int:
        return self._sequences.pauses

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def find(self, key: Key) -> Sequence | None:
        return self.running.get(key) or self.waiting.get(key)

    def waiting_for(self, adapter: str) -> list[Sequence]:
        """What does not run, of one adapter."""
        return [s for line in self.lines.waiting_by_adapter.get(adapter, ()) for s in line.waiting.values()]

    def check(self, tenant: str, adapter: str, count: int) -> None:
        """Raises MultiloraError if the tenant may not use the adapter, or have so many more sequences wait."""
        quota = self.lines.quota(tenant, self._now)
        name, cap = adapter_name(adapter), quota.tenant.adapter_bytes
        if not quota.tenant.may_use(name):
            raise invalid("lora_name", f"tenant {tenant!r} may not use {name!r}")
        if adapter and cap:
            nbytes, _ = self._adapters.device_bytes(adapter)
            if nbytes > cap:
                raise invalid("lora_name", f"{name!r} takes {nbytes} bytes, and adapter_bytes of {tenant!r} is {cap}")
        quota.check(count)

    def add(self, sequence: Sequence) -> None:
        self._now = max(self._now, sequence.arrival)
        self._sequences.add(sequence, self._now)
        # What a tenant may have on the device at once is not spent on predictions.
        if sequence.adapter and not self.lines.quota(sequence.tenant, self._now).tenant.adapter_bytes:
            self._preloader.arrivals.add(sequence.adapter, self._now)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence in any state and takes back what it holds."""
        self._sequences.finish(sequence, reason)

    def reassign(self, sequence: Sequence, adapter: str) -> None:
        """A waiting sequence is to use another revision, whose key is given. What was computed with the old is lost."""
        self._sequences.reassign(sequence, adapter, self._now)

    def next_event(self) -> float:
        """When a tenant that has used up a cap may go on: what else changes a plan is a message or an adapter."""
        return self.lines.next_event(self._now)

    def schedule(self, now: float) -> StepPlan:
        """Plans the next step. Computed tokens are counted here, before they are computed.

        A clock that goes back stands still until it is where it was.
        """
        now = self._now = max(now, self._now)
        if self.waiting or self.turns.holders:
            seats = len(self.running) < self.max_num_seqs
            self.turns.take(now, seats, lambda turn: self._sequences.pause(turn, now))
        slots, preempted, budget = self._continue_running()
        if not preempted and budget > 0 and self.waiting:
            self._admit(slots, budget, now)
        self.lines.charge_sampled(now)
        if not (self.waiting and self.turns.wanted):  # those who wait already come first
            self._preloader.look(now, self.lines.waiting_by_adapter)
        return StepPlan(tuple(slots), tuple(preempted), self.host.take_moves())

    def publish(self, plan: StepPlan) -> None:
        """After a step: what it computed can be found by other sequences."""
        if not self.pages.caching:
            return
        size = self.pages.page_size
        for slot in plan.slots:
            sequence = slot.sequence
            if sequence.pages and sequence.num_computed // size > sequence.num_published:
                self.pages.publish(sequence, sequence.root)

    def _continue_running(self) -> tuple[list[Slot], list[Sequence], int]:
        budget = self.max_num_batched_tokens
        slots: list[Slot] = []
        preempted: list[Sequence] = []
        queue = decode(self.running.values(), self.pages, slots)
        budget -= len(slots)
        by_class = self.policy.priority and self._sequences.classes_differ
        queue = in_order(queue, by_class=by_class)
        at = 0
        while at < len(queue) and budget > 0:
            sequence = queue[at]
            at += 1
            count = min(len(sequence.token_ids) - sequence.num_computed, budget)
            while not self.pages.extend(sequence, sequence.num_computed + count):
                if self._memory.take_back_newest():
                    continue
                victim = take_victim(queue, at) or sequence
                self._sequences.preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
            else:
                slots.append(advance(sequence, count))
                budget -= count
        return slots, preempted, budget

    def _admit(self, slots: list[Slot], budget: int, now: float) -> None:
        if len(self.running) >= self.max_num_seqs:
            return
        ready = Ready(self._ready(now), self.policy, now)
        while budget > 0 and len(self.running) < self.max_num_seqs and (line := ready.first()) is not None:
            sequence = line.head
            if line.held_back(now) or not self._sequences.lease(sequence):
                ready.drop()
                continue
            self._memory.admit(sequence)
            # Paused sequences lose their pages only so that every turn gets anywhere. Otherwise each turn would begin
            # by computing again what the turn before has thrown away.
            turn = self.turns.holders.get(sequence.adapter)
            first = not self.running or (turn is not None and not turn.sequences)
            # Pages for the whole prompt, or what decodes would take those of its next chunk.
            if not self._memory.extend(sequence, sequence.num_tokens, take_back=first):
                self._sequences.back_out(sequence)
                break
            self._memory.bring_back(sequence)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            self._sequences.start(sequence, now)
            slots.append(advance(sequence, count))
            budget -= count
            if not line.waiting:
                ready.drop()

    def _ready(self, now: float) -> Iterator[Line]:
        """Lines that may admit: of the base model, and of adapters that have a slot and need not give it up."""
        waiting = self.lines.waiting_by_adapter
        adapters = [turn.adapter for turn in self.turns.holders.values() if not turn.closing]
        for adapter in ("", *adapters):
            for line in waiting.get(adapter, ()):
                if not line.held_back(now):
                    yield line
