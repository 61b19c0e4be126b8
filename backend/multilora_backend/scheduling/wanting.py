# SPDX-License-Identifier: Apache-2.0
"""Lines whose adapter has no slot, in the order in which they get one, without sorting them.

Tenants share the slots: one with fewer of them, by its weight, comes first. Among a tenant's lines, and among tenants
with equally many, the smallest `due` is first. Entries of heaps are never removed when they become wrong, only passed
over: an entry counts if its line says that it is the newest.
"""

from __future__ import annotations

import heapq
import math
from itertools import count

from multilora_backend.scheduling.lines import Line

Entry = tuple[float, int, Line]


class Wanting:
    """Cost of `push` and of each line that `pop` gives: O(log n)."""

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        """Adapter slots by tenant that has some."""
        self._heaps: dict[str, list[Entry]] = {}
        """By tenant."""
        self._slotless: list[tuple[float, int, str]] = []
        """Tenants without a slot, by the due of their first line, or by less: it may have gone since."""
        self._announced: dict[str, float] = {}
        """Which of a tenant's entries there counts, by its due; the others are passed over."""
        self._parked: dict[str, float] = {}
        """Tenants that may not start anything before that time."""
        self._wake: list[tuple[float, str]] = []
        """When that is, where it is known; what `_parked` says otherwise by now does not count."""
        self._number = count(1)
        self._wanted = 0

    def __bool__(self) -> bool:
        """False if nobody wants a slot."""
        return self._wanted > 0

    def share(self, line: Line, more: int = 0) -> float:
        """Slots of the line's tenant, by its weight."""
        return (self.slots.get(line.tenant, 0) + more) / line.quota.tenant.weight

    def push(self, line: Line, due: float) -> None:
        """The line wants a slot; if it is there already, its due is changed."""
        self._wanted += not line.entry
        line.due, line.entry = due, next(self._number)
        heap = self._heaps.setdefault(line.tenant, [])
        heapq.heappush(heap, (due, line.entry, line))
        self._announce(line.tenant)

    def withdraw(self, line: Line) -> None:
        self._wanted -= bool(line.entry)
        line.entry = 0

    def took(self, tenant: str) -> None:
        self.slots[tenant] = self.slots.get(tenant, 0) + 1

    def gave(self, tenant: str) -> None:
        self.slots[tenant] -= 1
        if not self.slots[tenant]:
            del self.slots[tenant]
            self._announce(tenant)

    def park(self, tenant: str, until: float) -> None:
        """The tenant's lines are left out until then."""
        self._parked[tenant] = until
        if until < math.inf:
            heapq.heappush(self._wake, (until, tenant))

    def unpark(self, tenant: str) -> None:
        if self._parked.pop(tenant, None) is not None:
            self._announce(tenant)

    def pop(self, limit: int, now: float) -> list[Line]:
        """The first lines of tenants that may start something, each as if those before it had got a slot.

        `push` back those that got none.
        """
        while self._wake and self._wake[0][0] <= now:
            until, tenant = heapq.heappop(self._wake)
            if self._parked.get(tenant) == until:
                self.unpark(tenant)
        found: list[Line] = []
        popped: dict[str, int] = {}
        following: list[tuple[float, float, int, Line]] = []
        while self._slotless and len(found) < limit:
            due, _, tenant = heapq.heappop(self._slotless)
            if self._announced.get(tenant) != due:
                continue
            del self._announced[tenant]
            first = self._first(tenant)
            if first is None or tenant in self.slots or self._park(first, now):
                continue
            if first.due == due:
                found.append(self._remove(first))
                popped[tenant] = 1
            else:
                self._announce(tenant)
        for tenant in [*popped, *self.slots] if len(found) < limit else ():
            self._follow(following, tenant, popped, now)
        while following and len(found) < limit:
            line = heapq.heappop(following)[-1]
            found.append(self._remove(line))
            popped[line.tenant] = popped.get(line.tenant, 0) + 1
            self._follow(following, line.tenant, popped, now)
        for tenant in popped:
            self._announce(tenant)
        return found

    def _follow(
        self, following: list[tuple[float, float, int, Line]], tenant: str, popped: dict[str, int], now: float
    ) -> None:
        """Queues the tenant's first line by the slots that it would have by then."""
        first = None if tenant in self._parked else self._first(tenant)
        if first is not None and not self._park(first, now):
            heapq.heappush(following, (self.share(first, popped.get(tenant, 0)), first.due, first.entry, first))

    def _first(self, tenant: str) -> Line | None:
        heap = self._heaps.get(tenant)
        while heap:
            if heap[0][1] == heap[0][2].entry:
                return heap[0][2]
            heapq.heappop(heap)
        self._heaps.pop(tenant, None)
        return None

    def _remove(self, line: Line) -> Line:
        heapq.heappop(self._heaps[line.tenant])
        self.withdraw(line)
        return line

    def _park(self, line: Line, now: float) -> bool:
        """True if the line's tenant has used up a cap; it is then left out until it may start something again."""
        delay = line.held_back(now)
        if delay > 0:
            self.park(line.tenant, now + delay)
        return delay > 0

    def _announce(self, tenant: str) -> None:
        if tenant not in self.slots and tenant not in self._parked:
            first = self._first(tenant)
            if first is not None and first.due < self._announced.get(tenant, math.inf):
                self._announced[tenant] = first.due
                heapq.heappush(self._slotless, (first.due, next(self._number), tenant))
