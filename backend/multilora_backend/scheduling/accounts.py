# SPDX-License-Identifier: Apache-2.0
"""Who has had how much: virtual token counters in a tree of classes, tenants and adapters.

These are the counters of the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024), one tree level for each of what is shared between: the account with the smallest counter is served next,
service adds to its counter by its weight, and an account that had nothing to be served is lifted to the others when
it comes back, so that nobody saves up. While two accounts of one parent always have something waiting, their counters
differ by at most max(input weight x longest prompt, output weight x tokens that the batch can hold).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

Path = tuple["Account", ...]
"""From a class to an adapter of a tenant: every account that a sequence's service is charged to."""

SWEEP_AT = 64
"""Children, at least, before those that nobody would miss are looked for."""


@dataclass(eq=False)
class Account:
    """One class, one tenant in it, or one adapter of that tenant."""

    weight: float = 1.0
    parent: Account | None = None
    served: float = 0.0
    """Virtual counter: service so far over the weight, with what it was lifted by."""
    backlog: int = 0
    """Lines with waiting sequences, at this account or below it."""
    lines: int = 0
    """Lines with any sequence, likewise: while there are some, the account stays."""
    children: dict[str, Account] = field(default_factory=dict)
    _least: list[tuple[float, int, Account]] = field(default_factory=list)
    """Heap of the children with a backlog. Counters only grow, so an entry may say too little, never too much."""
    _last: Account | None = None
    """The child that was the last to lose its backlog."""
    _entries: int = 0
    _sweep_at: int = SWEEP_AT

    def child(self, name: str, weight: float) -> Account:
        account = self.children.get(name)
        if account is None:
            if len(self.children) >= self._sweep_at:
                self._sweep()
            account = self.children[name] = Account(weight, self, self.level())
        account.weight = weight
        return account

    def level(self) -> float:
        """Where a child that comes back starts: at the least of those with a backlog, or where the last one stands."""
        heap = self._least
        while heap:
            served, entry, account = heap[0]
            if not account.backlog:
                heapq.heappop(heap)
            elif served < account.served:
                heapq.heapreplace(heap, (account.served, entry, account))
            else:
                return served
        return self._last.served if self._last is not None else 0.0

    def gain(self) -> None:
        """One more line has something waiting."""
        if not self.backlog and self.parent is not None:
            self.served = max(self.served, self.parent.level())
            self.parent._entries += 1
            heapq.heappush(self.parent._least, (self.served, self.parent._entries, self))
        self.backlog += 1

    def lose(self) -> None:
        self.backlog -= 1
        if not self.backlog and self.parent is not None:
            self.parent._last = self

    def _sweep(self) -> None:
        """Drops children that would be lifted when they come back: nothing is known of them that matters."""
        level = self.level()
        self.children = {name: a for name, a in self.children.items() if a.lines or a.served > level}
        self._least = [entry for entry in self._least if entry[2].backlog]
        heapq.heapify(self._least)
        self._sweep_at = max(SWEEP_AT, 2 * len(self.children))


@dataclass(eq=False)
class Accounts:
    """The tree. The scheduler says what happens; a policy reads the counters."""

    root: Account = field(default_factory=Account)

    def open(self, *levels: tuple[str, float]) -> Path:
        """The accounts of a line, from the top, by name and weight; `close` it when the line is gone."""
        path, account = [], self.root
        for name, weight in levels:
            account = account.child(name, weight)
            account.lines += 1
            path.append(account)
        return tuple(path)


def close(path: Path) -> None:
    for account in path:
        account.lines -= 1


def backlogged(path: Path) -> None:
    """A line that had nothing waiting has. From the top: an account is lifted among its siblings."""
    for account in path:
        account.gain()


def emptied(path: Path) -> None:
    for account in path:
        account.lose()


def charge(path: Path, service: float) -> None:
    """`service` is in weighted tokens."""
    for account in path:
        account.served += service / account.weight
