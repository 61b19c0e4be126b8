# SPDX-License-Identifier: Apache-2.0
"""Which adapters take part in a step: turns, when there are more adapters than slots.

A slot is what `max_loras` counts, or the room that an adapter takes in the device pool: either way an adapter has one
as long as a sequence runs with it. Lines of other adapters want one (`scheduling.wanting`). They are looked at before
every step: adapters are asked for ahead of their turn, free slots are taken, and when somebody is overdue and nothing
is free, an adapter whose tenure is over gives its slot up (`scheduling.tenure`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator

from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import SequenceStatus
from multilora_backend.scheduling.handovers import Handovers, Turn
from multilora_backend.scheduling.interface import Adapters
from multilora_backend.scheduling.ledger import Ledger
from multilora_backend.scheduling.lines import Line, Lines
from multilora_backend.scheduling.policy import NEVER, Policy
from multilora_backend.scheduling.preload import SOON_S
from multilora_backend.scheduling.wanting import Wanting

LOOKAHEAD = 8
"""Lines without a slot that are looked at in a step, besides those whose adapter is ACTIVE."""
CAP_S = 0.05
"""So often a tenant with as many resident bytes as it may have is looked at."""
TIGHT_S = 1.0
"""So long after somebody waited for room in the pool, nothing is given room that has yet to be read from the disk."""
PREFETCH_PATIENCE_S = 1.0
"""But no longer than this beyond its due: the host may have no room either."""


class Turns:
    """Owns the slots and who wants one. The scheduler says what starts and ends."""

    def __init__(self, policy: Policy, lines: Lines, adapters: Adapters, max_loras: int) -> None:
        self.holders: dict[str, Turn] = {}
        self.wanting = Wanting()
        self.handovers = 0
        """Slots that were given up to somebody overdue."""
        self.wanted = False
        """Somebody who may start something waited for a slot when they were last given out, or for a load."""
        self._policy = policy
        self._lines = lines
        self._adapters = adapters
        self._max_loras = max_loras
        self._ledger = Ledger(adapters)
        self._seats = True
        """The batch can take in another sequence."""
        self._tight_until = 0.0
        self._left: dict[str, float] = {}
        """When adapters that want a slot last had one."""
        self._loading: dict[Line, None] = {}
        """Lines that want one once their adapter is there: a slow load hides nobody else from the look ahead."""
        self._handovers = Handovers(policy, lines, self.holders, self.wanting, self._left)

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
        self._loading.pop(line, None)
        if line.adapter not in self._lines.waiting_by_adapter and line.adapter not in self.holders:
            self._left.pop(line.adapter, None)

    def take(self, now: float, seats: bool, pause: Callable[[Turn], bool]) -> None:
        """Gives out slots for the next step. `seats`: the batch could take in another sequence.

        `pause` stops an adapter's sequences if that is wise now, and says whether its slot is free.
        """
        self._seats = seats
        for turn in [turn for turn in self.holders.values() if not turn.sequences]:
            self._end(turn, now)
        for line in [line for line in self._loading if not self._adapters.loading(line.adapter)]:
            del self._loading[line]
            if not line.entry:
                self.wants(line)
        active = self._active_outside()
        lines = self.wanting.pop(LOOKAHEAD, now)
        self.wanted = bool(lines or self._loading)
        if seats and not self._full:  # otherwise none of them can begin but by turning somebody out, in order
            listed = set(lines)
            lines += [line for line in active if line not in listed]
        self._handovers.open(max((self._policy.weight(line) for line in lines), default=1.0))
        self._hand_out(lines, {line.adapter for line in active}, now, pause)
        self._handovers.close()
        for line in lines:
            if line.waiting and line.adapter not in self.holders and line not in self._loading:
                self.wanting.push(line, line.due)

    def _hand_out(self, lines: list[Line], active: set[str], now: float, pause: Callable[[Turn], bool]) -> None:
        seen: set[str] = set()
        blocked = False  # somebody overdue waits for a slot, so no later line may take one, nor the room for it
        for line in self._in_order(lines, now):
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
                self.wanting.park(line.tenant, now + CAP_S)
                continue
            if now < self._tight_until and not self._at_hand(line, now):
                continue  # the room that it would take while it is read can serve somebody
            state = self._request(line, seen if overdue else seen | active)
            if state is AdapterState.ACTIVE:
                if full and overdue and self._turn_out(line, now, pause):
                    full = self._full
                if not full and self._seats:
                    self._begin(line, now)
                blocked = full and overdue
            elif state is AdapterState.LOADING:
                self._loading[line] = None
            elif self._adapters.waits_for_room(line.adapter):
                self._tight_until = now + TIGHT_S
                if overdue and self._at_hand(line, now):
                    if self._turn_out(line, now, pause):
                        self._request(line, seen)
                    # Where nobody has a slot or is about to, no turn's end makes room. What is in the way stays until
                    # its own sequences have ended (see `AdapterManager.give_up`), and they may be among the later ones.
                    ends = bool(self.holders or self._loading)
                    blocked = ends and self._adapters.waits_for_room(line.adapter)

    def _in_order(self, lines: list[Line], now: float) -> Iterator[Line]:
        """By `_order`, which changes while slots are given out: whose tenant has got one comes later."""
        queue = [(self._order(line, now), number, line) for number, line in enumerate(lines)]
        heapq.heapify(queue)
        while queue:
            before, number, line = queue[0]
            order = self._order(line, now)
            if order > before:
                heapq.heapreplace(queue, (order, number, line))
            else:
                heapq.heappop(queue)
                yield line

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
        if state in (AdapterState.LOADING, AdapterState.ACTIVE):
            self._ledger.asked(line)
        if state is not AdapterState.ACTIVE and line.head.status is SequenceStatus.WAITING:
            line.head.transition(SequenceStatus.WAITING_ADAPTER)
        return state

    def _at_hand(self, line: Line, now: float) -> bool:
        """True if the adapter would be there soon after it got room, or has been read for too long to wait for that."""
        if self._adapters.load_cost_s(line.adapter) <= SOON_S:
            return True
        self._adapters.prefetch(line.adapter)
        return now - line.due >= PREFETCH_PATIENCE_S

    def _turn_out(self, line: Line, now: float, pause: Callable[[Turn], bool], own: bool = False) -> bool:
        """Makes an adapter give up its slot to `line`; `own`: one of the same tenant. True if one is free by now."""
        turn = self._handovers.choose(line, now, self._seats, own)
        if turn is None:
            return False
        if pause(turn):
            self._end(turn, now)
            self._seats = True
            return True
        return False

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
            self._handovers.flow.count(now)
        self.handovers += turn.closing
        if turn.ran and lines:
            self._left[turn.adapter] = now
        elif not lines:
            self._left.pop(turn.adapter, None)
        for line in lines:
            self.wants(line)
