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
    active: float = 0.0
    """Weights of the children that have lines."""
    fair: float = 0.0
    """Where a child would stand that had always had its fair share: service over `active`, added up."""
    held: bool = False
    """A tenant that may not start anything, by its caps: what it has waiting is no backlog, so it saves up nothing."""
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
            account = self.children[name] = Account(weight, self, self.entry())
        account.weight = weight
        return account

    def entry(self) -> float:
        """Where a child that comes back starts.

        That is VTC's level, unless some have fallen behind their fair share: they come first. With the level alone,
        newcomers who never stop coming would keep it where it is, and nobody who is ahead of it would ever be served.
        """
        self.fair = max(self.fair, self.level())
        return self.fair

    def level(self) -> float:
        """The least counter of the children with a backlog, or that of the last one that had some."""
        heap = self._least
        while heap:
            served, entry, account = heap[0]
            if not account.backlog or account.held:
                heapq.heappop(heap)
            elif served < account.served:
                heapq.heapreplace(heap, (account.served, entry, account))
            else:
                return served
        return self._last.served if self._last is not None else 0.0

    def gain(self, lines: int = 1) -> None:
        """So many more lines have something waiting."""
        if lines and not self.backlog and not self.held:
            self._come_back()
        self.backlog += lines

    def lose(self, lines: int = 1) -> None:
        self.backlog -= lines
        if lines and not self.backlog and self.parent is not None and not self.held:
            self.parent._last = self

    def hold(self) -> None:
        """Its caps let it start nothing."""
        parent = self.parent
        if not self.held and parent is not None:
            if self.backlog:
                parent._last = self
                if parent.parent is not None:  # nobody counts at the root
                    parent.lose(self.backlog)
            self.held = True

    def unhold(self) -> None:
        """It may start something again, as if it had just come back."""
        parent = self.parent
        if self.held and parent is not None:
            if self.backlog:
                if parent.parent is not None:
                    parent.gain(self.backlog)
                self._come_back()  # while it is held it is not compared with itself
            self.held = False

    def _come_back(self) -> None:
        parent = self.parent
        if parent is not None:
            self.served = max(self.served, parent.entry())
            if len(parent._least) > 2 * len(parent.children) + SWEEP_AT:  # one that stays behind hides old entries
                parent._rebuild()
            parent._entries += 1
            heapq.heappush(parent._least, (self.served, parent._entries, self))

    def _sweep(self) -> None:
        """Drops children that would be lifted when they come back: nothing is known of them that matters."""
        entry = self.entry()
        self.children = {name: a for name, a in self.children.items() if a.lines or a.served > entry}
        self._rebuild()
        self._sweep_at = max(SWEEP_AT, 2 * len(self.children))

    def _rebuild(self) -> None:
        waiting = [a for a in self.children.values() if a.backlog and not a.held]
        self._least = [(account.served, number, account) for number, account in enumerate(waiting, 1)]
        heapq.heapify(self._least)
        self._entries = len(waiting)


@dataclass(eq=False)
class Accounts:
    """The tree. The scheduler says what happens; a policy reads the counters."""

    root: Account = field(default_factory=Account)

    def open(self, *levels: tuple[str, float]) -> Path:
        """The accounts of a line, from the top, by name and weight; `close` it when the line is gone."""
        path, account = [], self.root
        for name, weight in levels:
            parent, account = account, account.child(name, weight)
            parent.active += 0.0 if account.lines else account.weight
            account.lines += 1
            path.append(account)
        return tuple(path)


def close(path: Path) -> None:
    for account in path:
        account.lines -= 1
        if not account.lines and account.parent is not None:
            account.parent.active -= account.weight


def backlogged(path: Path) -> None:
    """A line that had nothing waiting has. From the top: an account is lifted among its siblings."""
    for account in _counting(path):
        account.gain()


def emptied(path: Path) -> None:
    for account in _counting(path):
        account.lose()


def _counting(path: Path) -> Path:
    """Accounts that a line's backlog counts at: none above one that is held."""
    for index, account in enumerate(path):
        if account.held:
            return path[index:]
    return path


def charge(path: Path, service: float) -> None:
    """`service` is in weighted tokens."""
    for account in path:
        account.served += service / account.weight
        parent, weight = account.parent, account.weight
        if parent is not None:
            parent.fair += service / (parent.active if parent.active > weight else weight)
