# SPDX-License-Identifier: Apache-2.0
"""Which adapters take part in a step: turns, when there are more adapters than slots.

A slot is what `max_loras` counts, or the room that an adapter takes in the device pool: either way an adapter has one
as long as a sequence runs with it. Lines of other adapters want one (`scheduling.wanting`). They are looked at before
every step: adapters are asked for ahead of their turn, free slots are taken, and when somebody is overdue and nothing
is free, an adapter whose tenure is over gives its slot up (`scheduling.tenure`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import SequenceStatus
from multilora_backend.scheduling.interface import Adapters
from multilora_backend.scheduling.ledger import Ledger
from multilora_backend.scheduling.lines import Line, Lines, first
from multilora_backend.scheduling.policy import NEVER, Policy
from multilora_backend.scheduling.preload import SOON_S
from multilora_backend.scheduling.tenure import PATIENCE, Candidate, Flow, Holder, scaled, victim
from multilora_backend.scheduling.wanting import Wanting

LOOKAHEAD = 16
"""Lines without a slot that are looked at in a step, besides those whose adapter is ACTIVE."""
HANDOVERS = 4
"""Slots that are given up in a step, at most: each may cost the adapter manager a look at all that it has."""
TIGHT_S = 1.0
"""So long after somebody waited for room in the pool, nothing is given room that has yet to be read from the disk."""
PREFETCH_PATIENCE_S = 1.0
"""But no longer than this beyond its due: the host may have no room either."""


@dataclass(eq=False)
class Turn:
    """An adapter has a slot."""

    adapter: str
    tenant: str
    """Whose line took it: the slot counts as that tenant's."""
    weight: float
    """Of the class of that line."""
    since: float
    running: int = 0
    ran: bool = False
    """A sequence has run with it in this turn."""
    closing: bool = False
    """It admits nothing more, for somebody is to have its slot."""


class Turns:
    """Owns the slots and who wants one. The scheduler says what starts and ends."""

    def __init__(self, policy: Policy, lines: Lines, adapters: Adapters, max_loras: int) -> None:
        self.holders: dict[str, Turn] = {}
        self.wanting = Wanting()
        self.handovers = 0
        """Slots that were given up to somebody overdue."""
        self._policy = policy
        self._lines = lines
        self._adapters = adapters
        self._max_loras = max_loras
        self._ledger = Ledger(adapters)
        self._seats = True
        """The batch can take in another sequence."""
        self._tight_until = 0.0
        self._flow = Flow(2 * policy.tenure_s)
        self._closing: list[Turn] = []
        """Those that give up their slot, as far as nobody was found for it in this step."""
        self._tenured: list[Holder] | None = None
        """Who could be turned out in this step; None: not looked up yet."""
        self._handed = 0
        self._heaviest = 1.0
        """Largest weight of a class among those who want a slot in this step."""
        self._left: dict[str, float] = {}
        """When adapters that want a slot were last turned out."""

    @property
    def _full(self) -> bool:
        return bool(self._max_loras) and len(self.holders) >= self._max_loras

    def wants(self, line: Line) -> None:
        """The line has a new head. It is queued for a slot unless its adapter has one or it needs none."""
        if line.adapter and line.adapter not in self.holders:
            self.wanting.push(line, self._policy.due(line, self._left.get(line.adapter, NEVER)))

    def withdraw(self, line: Line) -> None:
        """Nothing waits in the line any more."""
        self.wanting.withdraw(line)
        if line.adapter not in self._lines.waiting_by_adapter and line.adapter not in self.holders:
            self._left.pop(line.adapter, None)

    def take(self, now: float, seats: bool, pause: Callable[[Turn], bool]) -> None:
        """Gives out slots for the next step. `seats`: the batch could take in another sequence.

        `pause` stops an adapter's sequences if that is wise now, and says whether its slot is free.
        """
        self._seats, self._tenured, self._handed = seats, None, 0
        for turn in [turn for turn in self.holders.values() if not turn.running]:
            self._end(turn, now)
        active = self._active_outside()
        lines = self.wanting.pop(LOOKAHEAD, now)
        if seats and not self._full:  # otherwise none of them can begin but by turning somebody out, in order
            listed = set(lines)
            lines += [line for line in active if line not in listed]
        self._closing = [turn for turn in self.holders.values() if turn.closing]
        self._heaviest = max((self._policy.weight(line) for line in lines), default=1.0)
        lines.sort(key=lambda line: self._order(line, now))
        self._hand_out(lines, {line.adapter for line in active}, now, pause)
        for turn in self._closing:  # nobody needs their slots any more
            turn.closing = False
        for line in lines:
            if line.waiting and line.adapter not in self.holders:
                self.wanting.push(line, line.due)

    def _hand_out(self, lines: list[Line], active: set[str], now: float, pause: Callable[[Turn], bool]) -> None:
        seen: set[str] = set()
        blocked = False  # somebody overdue waits for a slot, so no later line may take one, nor the room for it
        for line in lines:
            if line.adapter in seen or line.adapter in self.holders:
                continue
            seen.add(line.adapter)
            overdue = now >= line.due
            if blocked:
                if overdue:
                    self._turn_out(line, now, pause)
                continue
            full = self._full
            if not overdue and (full or not self._seats) and not self._policy.preload:
                continue
            if line.quota.tenant.adapter_bytes and not self._ledger.admits(line, self.holders):
                if overdue and line.tenant in self.wanting.slots:  # its own adapters are in the way, nobody else's
                    self._turn_out(line, now, pause, own=True)
                continue
            if now < self._tight_until and self._adapters.load_cost_s(line.adapter) > SOON_S:
                self._adapters.prefetch(line.adapter)  # the room that it takes while it is read can serve somebody
                if now - line.due < PREFETCH_PATIENCE_S:
                    continue
            state = self._request(line, seen if overdue else seen | active)
            if state is AdapterState.ACTIVE:
                if full and overdue and self._turn_out(line, now, pause):
                    full = self._full
                if not full and self._seats:
                    self._begin(line, now)
                blocked = full and overdue
            elif self._adapters.waits_for_room(line.adapter):
                self._tight_until = now + TIGHT_S
                if overdue:
                    if self._turn_out(line, now, pause):
                        self._request(line, seen)
                    blocked = self._adapters.waits_for_room(line.adapter)

    def _order(self, line: Line, now: float) -> tuple[bool, bool, float, float]:
        overdue = now >= line.due
        resident = not overdue and line.adapter in self._adapters.resident()
        return not overdue, not overdue and not resident, self.wanting.share(line), line.due

    def _active_outside(self) -> list[Line]:
        """The first line of every ACTIVE adapter that wants a slot."""
        waiting, resident = self._lines.waiting_by_adapter, self._adapters.resident()
        few, many = (waiting, resident) if len(waiting) < len(resident) else (resident, waiting)
        found = []
        for adapter in few:
            if adapter in many and adapter not in self.holders and adapter:
                # Whether a tenant with caps may start something is known when its lines are popped.
                queued = [line for line in waiting[adapter] if line.entry and not line.quota.capped]
                if queued:
                    found.append(min(queued, key=lambda line: line.due))
        return found

    def _request(self, line: Line, protect: Collection[str]) -> AdapterState:
        state = self._adapters.request(line.adapter, protect)
        self._ledger.asked(line)
        if state is not AdapterState.ACTIVE and line.head.status is SequenceStatus.WAITING:
            line.head.transition(SequenceStatus.WAITING_ADAPTER)
        return state

    def _turn_out(self, line: Line, now: float, pause: Callable[[Turn], bool], own: bool = False) -> bool:
        """Makes an adapter give up its slot to `line`; `own`: one of the same tenant. True if one is free by now."""
        turn = next((turn for turn in self._closing if not own or turn.tenant == line.tenant), None)
        if turn is not None:
            self._closing.remove(turn)
        else:
            turn = self._choose(line, now, own)
            if turn is None:
                return False
            turn.closing = True
        if pause(turn):
            self._end(turn, now)
            self._seats = True
            return True
        return False

    def _choose(self, line: Line, now: float, own: bool) -> Turn | None:
        if self._handed >= HANDOVERS:
            return None
        tenure = self._policy.tenure_s * (PATIENCE if self._flow.suffices(len(self.holders), now) else 1)
        if self._tenured is None:
            turns = (
                turn
                for turn in self.holders.values()
                if now - turn.since >= scaled(tenure, turn.weight, self._heaviest)
            )
            self._tenured = [self._holder(turn, now) for turn in turns if not turn.closing]
        candidate = Candidate(line.due, self._policy.weight(line), self.wanting.share(line, 1))
        holders = [h for h in self._tenured if not own or self.holders[h.adapter].tenant == line.tenant]
        chosen = victim(holders, candidate, tenure, self._seats)
        if chosen is None:
            return None
        self._handed += 1
        self._tenured = [holder for holder in self._tenured if holder.adapter != chosen]
        return self.holders[chosen]

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
            share=self.wanting.slots[turn.tenant] / self._lines.quota(turn.tenant, now).tenant.weight,
        )

    def _begin(self, line: Line, now: float) -> None:
        self.holders[line.adapter] = Turn(line.adapter, line.tenant, self._policy.weight(line), now)
        self.wanting.took(line.tenant)
        for other in self._lines.waiting_by_adapter[line.adapter]:
            self.wanting.withdraw(other)

    def _end(self, turn: Turn, now: float) -> None:
        del self.holders[turn.adapter]
        self.wanting.gave(turn.tenant)
        lines = self._lines.waiting_by_adapter.get(turn.adapter, {})
        if turn.ran and not turn.closing:
            self._flow.count(now)
        if turn.closing and lines:
            self._left[turn.adapter] = now
            self.handovers += 1
        elif not lines:
            self._left.pop(turn.adapter, None)
        for line in lines:
            self.wants(line)
