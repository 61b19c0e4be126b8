# SPDX-License-Identifier: Apache-2.0
"""Where sequences wait: one line for each class, tenant and adapter, so that a step looks at heads only."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from multilora_backend.core import Sequence
from multilora_backend.scheduling.accounts import Accounts, Path, backlogged, charge, close, emptied
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.quotas import Quota
from multilora_backend.scheduling.tenants import SlaClass, Tenants, class_of

Key = tuple[str, int, int]

FORGET_AT = 256
"""Tenants, at least, before those that have nothing here are forgotten: their names come from clients."""


@dataclass(eq=False, slots=True)
class Line:
    """Sequences of one class, tenant and adapter. Within it, first come, first served."""

    sla: SlaClass
    quota: Quota
    adapter: str
    path: Path
    waiting: OrderedDict[Key, Sequence] = field(default_factory=OrderedDict)
    """What has run before (paused, preempted) is in front."""
    fresh: OrderedDict[Key, Sequence] = field(default_factory=OrderedDict)
    """Those of them that have never run."""
    running: int = 0
    sampled: int = 0
    """Tokens of the step that is being planned, until they are charged."""
    due: float = math.inf
    """See `Policy.due`; kept by `scheduling.wanting`, while the line is there."""
    entry: int = 0
    """Its newest entry there; 0 if it is not."""

    @property
    def head(self) -> Sequence:
        return first(self.waiting)

    @property
    def tenant(self) -> str:
        return self.quota.tenant.name

    def held_back(self, now: float) -> float:
        """Seconds until its tenant may start one more, which takes it out of the sharing until it does."""
        delay = self.quota.delay(now) if self.quota.capped else 0.0
        if delay > 0:
            self.path[-2].hold()
        return delay


class Lines:
    """All lines, and the books that go with them: accounts and quotas."""

    def __init__(self, policy: Policy, tenants: Tenants) -> None:
        self.accounts = Accounts()
        self.waiting_by_adapter: dict[str, dict[Line, None]] = {}
        """Lines that have something waiting."""
        self.running: dict[Line, None] = {}
        """Lines that have something running."""
        self._policy = policy
        self._tenants = tenants
        self._lines: dict[tuple[str, str, str], Line] = {}
        self._quotas: dict[str, Quota] = {}
        self._forget_at = FORGET_AT

    def quota(self, tenant: str, now: float) -> Quota:
        quota = self._quotas.get(tenant)
        if quota is None:
            if len(self._quotas) >= self._forget_at:
                self._quotas = {n: q for n, q in self._quotas.items() if not q.forgettable(now)}
                self._forget_at = max(FORGET_AT, 2 * len(self._quotas))
            quota = self._quotas[tenant] = Quota(self._tenants.get(tenant))
        return quota

    def next_event(self, now: float) -> float:
        """When the first tenant that waits for its bucket of tokens may start something; infinite if none does."""
        waiting = (quota for quota in self._quotas.values() if quota.waiting and quota.tenant.tokens_per_s)
        return min((now + delay for quota in waiting if (delay := quota.delay(now)) > 0), default=math.inf)

    def join(self, sequence: Sequence, now: float) -> Line:
        """Gives a new sequence its line; `put` lets it wait there."""
        quota = self.quota(sequence.tenant, now)
        sla = class_of(quota.tenant, sequence.priority)
        key = (sla.name, sequence.tenant, sequence.adapter)
        line = self._lines.get(key)
        if line is None:
            path = self.accounts.open(*self._policy.accounts(sla, quota.tenant, sequence.adapter))
            line = self._lines[key] = Line(sla, quota, sequence.adapter, path)
        sequence.line = line
        return line

    def put(self, sequence: Sequence, *, front: bool = False) -> bool:
        """The sequence waits in its line from now on. True if it is the line's head, or its first that never ran."""
        line = line_of(sequence)
        line.quota.waiting += 1
        if not line.waiting:
            backlogged(line.path)
            self.waiting_by_adapter.setdefault(line.adapter, {})[line] = None
            front = True
        line.waiting[sequence.key] = sequence
        if sequence.started is None:
            line.fresh[sequence.key] = sequence
        if front:
            line.waiting.move_to_end(sequence.key, last=False)
        return front or len(line.fresh) == 1

    def take(self, sequence: Sequence) -> None:
        """The sequence does not wait any longer."""
        line = line_of(sequence)
        line.quota.waiting -= 1
        del line.waiting[sequence.key]
        line.fresh.pop(sequence.key, None)
        if not line.waiting:
            emptied(line.path)
            lines = self.waiting_by_adapter[line.adapter]
            del lines[line]
            if not lines:
                del self.waiting_by_adapter[line.adapter]

    def leave(self, sequence: Sequence) -> None:
        """The sequence, which neither waits nor runs, has no part in its line any more."""
        line = line_of(sequence)
        sequence.line = None
        if not line.waiting and not line.running:
            close(line.path)
            del self._lines[line.sla.name, line.tenant, line.adapter]

    def charge_prompt(self, sequence: Sequence, now: float) -> None:
        line = line_of(sequence)
        line.path[-2].unhold()
        charge(line.path, self._policy.input_weight * sequence.prompt_len)
        line.quota.charge(sequence.prompt_len, now)

    def charge_sampled(self, now: float) -> None:
        """What lines have `sampled` in this step."""
        for line in self.running:
            if line.sampled:
                charge(line.path, self._policy.output_weight * line.sampled)
                if line.quota.tenant.tokens_per_s:
                    line.quota.charge(line.sampled, now)
                line.sampled = 0


def first(queue: OrderedDict[Key, Sequence]) -> Sequence:
    return next(iter(queue.values()))


def line_of(sequence: Sequence) -> Line:
    """Raises RuntimeError for a sequence that no scheduler has."""
    if sequence.line is None:
        raise RuntimeError(f"sequence {sequence.key} is in no line")
    return sequence.line
