# SPDX-License-Identifier: Apache-2.0
"""Who gives up an adapter slot in this step: the state that `scheduling.tenure` decides about."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import islice

from multilora_backend.core import Sequence
from multilora_backend.scheduling.lines import Key, Line, Lines, first
from multilora_backend.scheduling.policy import NEVER, Policy
from multilora_backend.scheduling.tenure import PATIENCE, Candidate, Flow, Holder, scaled, victim
from multilora_backend.scheduling.wanting import Wanting

AT_ONCE = 4
"""Slots that are given up in a step, at most: each may cost the adapter manager a look at all that it has."""
CHOICE = 16
"""Adapters that are compared when one of them has to go."""


@dataclass(eq=False)
class Turn:
    """An adapter has a slot."""

    adapter: str
    tenant: str
    """Whose line took it: the slot counts as that tenant's."""
    weight: float
    """Of the class of that line."""
    since: float
    sequences: dict[Key, Sequence] = field(default_factory=dict)
    """Those that run with it, in order of admission."""
    ran: bool = False
    """A sequence has run with it in this turn."""
    closing: bool = False
    """It admits nothing more, for somebody is to have its slot."""

    @property
    def running(self) -> int:
        return len(self.sequences)


class Handovers:
    """Chooses among the holders of slots, step by step."""

    def __init__(
        self, policy: Policy, lines: Lines, holders: dict[str, Turn], wanting: Wanting, left: dict[str, float]
    ) -> None:
        self.flow = Flow(2 * policy.tenure_s)
        self._policy = policy
        self._lines = lines
        self._holders = holders
        self._wanting = wanting
        self._left = left
        self._closing: list[Turn] = []
        """Those that give up their slot, as far as nobody was found for it in this step."""
        self._tenured: list[Holder] | None = None
        """Who could be turned out in this step; None: not looked up yet."""
        self._chosen = 0
        self._heaviest = 1.0

    def open(self, heaviest: float) -> None:
        """A step begins. `heaviest` is the largest weight of a class among those who want a slot."""
        self._closing = [turn for turn in self._holders.values() if turn.closing]
        self._tenured, self._chosen, self._heaviest = None, 0, heaviest

    def close(self) -> None:
        """Slots that nobody needs any more are not given up."""
        for turn in self._closing:
            turn.closing = False

    def choose(self, line: Line, now: float, seats: bool, own: bool) -> Turn | None:
        """Whose slot the line's adapter is to have; with `own` only one of its tenant's. None: nobody's yet."""
        turn = next((turn for turn in self._closing if not own or turn.tenant == line.tenant), None)
        if turn is not None:
            self._closing.remove(turn)
            return turn
        if self._chosen >= AT_ONCE:
            return None
        tenure = self._policy.tenure_s * (PATIENCE if self.flow.suffices(len(self._holders), now) else 1)
        if self._tenured is None:
            self._tenured = self._look_up(tenure, now)
        candidate = Candidate(line.due, self._policy.weight(line), self._wanting.share(line, 1))
        holders = [h for h in self._tenured if not own or self._holders[h.adapter].tenant == line.tenant]
        adapter = victim(holders, candidate, tenure, seats)
        if adapter is None:
            return None
        self._chosen += 1
        self._tenured = [holder for holder in self._tenured if holder.adapter != adapter]
        turn = self._holders[adapter]
        turn.closing = True
        return turn

    def _look_up(self, tenure: float, now: float) -> list[Holder]:
        # Turns are in the order in which they began; the first ones do, and keep the choice cheap.
        turns = (
            turn
            for turn in self._holders.values()
            if not turn.closing and now - turn.since >= scaled(tenure, turn.weight, self._heaviest)
        )
        return [self._holder(turn, now) for turn in islice(turns, CHOICE)]

    def _holder(self, turn: Turn, now: float) -> Holder:
        lines = self._lines.waiting_by_adapter.get(turn.adapter, {})
        left = self._left.get(turn.adapter, NEVER)
        return Holder(
            adapter=turn.adapter,
            held_s=now - turn.since,
            due=min((self._policy.due(line, left) for line in lines), default=math.inf),
            behind=any(line.fresh and first(line.fresh).arrival < turn.since for line in lines),
            work=turn.running + sum(len(line.waiting) for line in lines),
            weight=turn.weight,
            share=self._wanting.slots[turn.tenant] / self._lines.quota(turn.tenant, now).tenant.weight,
        )
