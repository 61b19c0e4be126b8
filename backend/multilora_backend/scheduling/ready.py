# SPDX-License-Identifier: Apache-2.0
"""Lines that may admit in this step, in the order of `Policy.rank`, which every admission changes.

An admission moves its class, its tenant and its line, and nobody else. So there is a heap of lines for each tenant and
one of tenants for each class, and only what is on top is ranked anew: with one heap of all lines each admission would
rank all of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from multilora_backend.scheduling.accounts import Account
from multilora_backend.scheduling.lines import Line
from multilora_backend.scheduling.policy import Policy

Rank = tuple[float, ...]
Lines = list[tuple[Rank, int, Line]]
"""Heap of a tenant's lines in a class."""


class Ready:
    """Cost: O(1) a line to begin with, O(log n) an admission."""

    def __init__(self, lines: Iterable[Line], policy: Policy, now: float) -> None:
        self._policy = policy
        self._now = now
        classes: dict[Account | None, dict[Account | None, Lines]] = {}
        for number, line in enumerate(lines):
            group = line.path[0] if policy.priority else None
            account = line.path[-2] if policy.fair_share else None
            tenants = classes.setdefault(group, {})
            tenants.setdefault(account, []).append((policy.line_rank(line, now), number, line))
        self._classes: dict[Account | None, list[tuple[Rank, int, Lines]]] = {}
        """Heaps of tenants, whose ranks are those of their first lines."""
        for group, tenants in classes.items():
            for heap in tenants.values():
                heapq.heapify(heap)
            self._classes[group] = [(self._rank(heap), heap[0][1], heap) for heap in tenants.values()]
            heapq.heapify(self._classes[group])
        self._group: Account | None = None
        """Of the line that `first` gave."""

    def first(self) -> Line | None:
        """The line to admit from next; it stays the first until it is charged or dropped."""
        while self._classes:
            group = self._group = min(self._classes, key=_class_rank)
            tenants = self._classes[group]
            before, _, heap = tenants[0]
            was, number, line = heap[0]
            rank = self._policy.line_rank(line, self._now)
            if rank != was:
                heapq.heapreplace(heap, (rank, number, line))
            elif (ranked := self._rank(heap)) != before:
                heapq.heapreplace(tenants, (ranked, number, heap))
            else:
                return line
        return None

    def _rank(self, heap: Lines) -> Rank:
        rank, _, line = heap[0]
        return self._policy.tenant_rank(line), *rank

    def drop(self) -> None:
        """The line that `first` gave admits nothing more in this step."""
        tenants = self._classes[self._group]
        heap = tenants[0][2]
        heapq.heappop(heap)
        if not heap:
            heapq.heappop(tenants)
            if not tenants:
                del self._classes[self._group]


def _class_rank(group: Account | None) -> Rank:
    return () if group is None else (group.served, -group.weight)
