# SPDX-License-Identifier: Apache-2.0
"""Where every sequence is, and all ways from one place to another: waiting, running, paused, gone."""

from __future__ import annotations

from collections import Counter

from multilora_backend.adapters.activation import first_active
from multilora_backend.core import FinishReason, Sequence, SequenceStatus
from multilora_backend.scheduling.handovers import Turn
from multilora_backend.scheduling.host import HostPages
from multilora_backend.scheduling.interface import Adapters
from multilora_backend.scheduling.lines import Key, Lines, first, line_of
from multilora_backend.scheduling.memory import Memory
from multilora_backend.scheduling.pages import PageTable
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.tenants import Tenants
from multilora_backend.scheduling.tenure import PATIENCE
from multilora_backend.scheduling.turns import Turns


class Sequences:
    """Keeps the books of all that depends on where a sequence is: lines, turns, quotas, leases and pages."""

    def __init__(
        self, pages: PageTable, host: HostPages, adapters: Adapters, policy: Policy, tenants: Tenants, max_loras: int
    ) -> None:
        self.waiting: dict[Key, Sequence] = {}
        self.running: dict[Key, Sequence] = {}
        self.lines = Lines(policy, tenants)
        self.turns = Turns(policy, self.lines, adapters, max_loras)
        self.memory = Memory(pages, host)
        self.pauses = 0
        self._weights: Counter[float] = Counter()
        """Running sequences by the weight of their class."""
        self._pages = pages
        self._adapters = adapters
        self._policy = policy

    @property
    def classes_differ(self) -> bool:
        """Running sequences are of classes of unequal weight."""
        return len(self._weights) > 1

    def add(self, sequence: Sequence, now: float) -> None:
        line = self.lines.join(sequence, now)
        sequence.deadline = min(sequence.deadline, sequence.arrival + line.sla.deadline_s)
        self._wait(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._stop(sequence)
        else:
            self._wait_no_more(sequence)
        self.memory.release(sequence)
        self.lines.leave(sequence)
        sequence.transition(SequenceStatus.FINISHED, reason)

    def reassign(self, sequence: Sequence, adapter: str, now: float) -> None:
        self._wait_no_more(sequence)
        self.memory.release(sequence)
        self.lines.leave(sequence)
        if sequence.status is not SequenceStatus.WAITING:
            sequence.transition(SequenceStatus.WAITING)
        sequence.adapter = adapter
        self.add(sequence, now)

    def lease(self, sequence: Sequence) -> bool:
        """True if a waiting sequence may run; pages that another version of its adapter filled are given up."""
        if not sequence.adapter:
            return True
        sequence.lease = self._adapters.lease(sequence.adapter)
        if sequence.lease is None:
            return False
        root = sequence.lease.version.encode()
        if root != sequence.root and (sequence.pages or sequence.host_pages):
            self.memory.discard(sequence)
        if root != sequence.root:
            sequence.adapter_start = first_active(sequence.token_ids[: sequence.prompt_len], sequence.lease.invocation)
        sequence.root = root
        return True

    def back_out(self, sequence: Sequence) -> None:
        """A waiting sequence that got its lease cannot run after all. A paused one keeps its pages."""
        self._release_lease(sequence)
        if sequence.key not in self.memory.paused:
            self._pages.release(sequence)

    def start(self, sequence: Sequence, now: float) -> None:
        self._wait_no_more(sequence)
        self.running[sequence.key] = sequence
        sequence.start_len = len(sequence.token_ids)
        line = line_of(sequence)
        line.running += 1
        self.lines.running[line] = None
        self._weights[line.sla.weight] += 1
        line.quota.running += 1
        if sequence.adapter:
            turn = self.turns.holders[sequence.adapter]
            turn.sequences[sequence.key] = sequence
            turn.ran = True
        if sequence.started is None:
            sequence.started = now
            self._pages.count(sequence)
            self.lines.charge_prompt(sequence, now)
        sequence.transition(SequenceStatus.RUNNING)

    def pause(self, turn: Turn, now: float) -> bool:
        """Stops an adapter's sequences, unless pages are short: then they drain, but not for ever. True if it is done.

        Each has sampled a token first, so whatever is taken from it later, it gets on. Those whose last token is on
        its way go on to their end, which the next turn of the engine's loop brings.
        """
        mine = [sequence for sequence in turn.sequences.values() if not sequence.complete]
        if any(len(sequence.token_ids) == sequence.start_len for sequence in mine):
            return False
        short = self._pages.num_free < sum(len(sequence.pages) for sequence in mine)
        if short and now - turn.since < PATIENCE * self._policy.tenure_s:
            return False
        for sequence in reversed(mine):
            self._stop(sequence)
            sequence.transition(SequenceStatus.PAUSED)
            self._wait(sequence, front=True)
        self.memory.paused |= {sequence.key: sequence for sequence in mine}
        self.pauses += len(mine)
        return not turn.sequences

    def preempt(self, sequence: Sequence) -> None:
        """A running sequence loses its pages."""
        self._stop(sequence)
        self.memory.take_back(sequence)
        self._wait(sequence, front=True)

    def _wait(self, sequence: Sequence, *, front: bool = False) -> None:
        self.waiting[sequence.key] = sequence
        if self.lines.put(sequence, front=front):
            self.turns.wants(line_of(sequence))

    def _wait_no_more(self, sequence: Sequence) -> None:
        line = line_of(sequence)
        was_first = line.head is sequence or (bool(line.fresh) and first(line.fresh) is sequence)
        del self.waiting[sequence.key]
        self.memory.paused.pop(sequence.key, None)
        self.lines.take(sequence)
        if not line.waiting:
            self.turns.withdraw(line)
        elif was_first:
            self.turns.wants(line)

    def _stop(self, sequence: Sequence) -> None:
        """The sequence does not run any more; its pages are left to the caller."""
        del self.running[sequence.key]
        line = line_of(sequence)
        line.running -= 1
        if not line.running:
            del self.lines.running[line]
        self._weights[line.sla.weight] -= 1
        if not self._weights[line.sla.weight]:
            del self._weights[line.sla.weight]
        line.quota.running -= 1
        if line.quota.capped:
            self.turns.wanting.unpark(line.tenant)
        if sequence.adapter:
            del self.turns.holders[sequence.adapter].sequences[sequence.key]
        self._release_lease(sequence)

    def _release_lease(self, sequence: Sequence) -> None:
        if sequence.lease is not None:
            self._adapters.release(sequence.lease)
            sequence.lease = None
