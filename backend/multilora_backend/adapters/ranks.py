# SPDX-License-Identifier: Apache-2.0
"""Who lies where in the device pool's rank dimension: pages of 8 ranks, contiguous ranges, in plain Python.

Eight ranks are the grain because a kernel's tile over ranks is a multiple of it; an adapter of rank 4 therefore
costs as much memory as one of rank 8, but is computed at rank 4.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

PAGE = 8


def padded(rank: int) -> int:
    """Ranks that an adapter of this rank takes in the pool."""
    return -(-rank // PAGE) * PAGE


class RankAllocator:
    """First fit over [0, num_ranks). Free ranges are kept sorted and joined, so two never touch."""

    def __init__(self, num_ranks: int) -> None:
        if num_ranks < PAGE or num_ranks % PAGE:
            raise ValueError(f"num_ranks: must be a positive multiple of {PAGE}, got {num_ranks}")
        self.num_ranks = num_ranks
        self._free: list[tuple[int, int]] = [(0, num_ranks)]
        self._used: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return sum(stop - start for start, stop in self._free)

    def allocate(self, rank: int) -> int | None:
        """Start of a contiguous range for `rank`, or None if there is none."""
        size = padded(rank)
        if size < PAGE:
            raise ValueError(f"rank: must be at least 1, got {rank}")
        for start, stop in self._free:
            if stop - start >= size:
                self._take(start, size)
                return start
        return None

    def free(self, start: int) -> None:
        """Takes back a range that `allocate` gave. Raises KeyError for anything else."""
        stop = self._used.pop(start)
        index = bisect.bisect(self._free, (start, stop))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, stop))

    def move(self, start: int, to: int) -> None:
        """Moves a range that `allocate` gave. Raises ValueError if any but its own ranks are in the way."""
        size = self._used[start] - start
        self.free(start)
        if not self._take(to, size):
            self._take(start, size)
            raise ValueError(f"ranks {to} to {to + size} are not free")

    def _take(self, start: int, size: int) -> bool:
        """Allocates exactly this range, if it is free."""
        index = bisect.bisect(self._free, (start, self.num_ranks)) - 1
        if index < 0 or self._free[index][1] < start + size:
            return False
        first, stop = self._free[index]
        self._free[index : index + 1] = [r for r in ((first, start), (start + size, stop)) if r[0] < r[1]]
        self._used[start] = start + size
        return True


@dataclass(frozen=True)
class Place:
    """Where an adapter lies: its row in the pool's tables, and its ranks."""

    slot: int
    rank_start: int
    rank: int


@dataclass(frozen=True)
class Span:
    start: int
    stop: int
    name: str

    @property
    def size(self) -> int:
        return self.stop - self.start


class Places:
    """Slots and rank ranges of the adapters that have, or will have, their weights on the device."""

    def __init__(self, num_ranks: int) -> None:
        self._ranks = RankAllocator(num_ranks)
        self._slots = list(range(num_ranks // PAGE))  # a heap: the lowest free slot is taken first
        self._places: dict[str, Place] = {}

    def claim(self, name: str, rank: int) -> Place | None:
        """A place for an adapter that has none; None if there is no contiguous room."""
        start = self._ranks.allocate(rank)
        if start is None:
            return None
        # Each adapter takes a page at least, so a slot is free whenever a range is.
        place = Place(heapq.heappop(self._slots), start, rank)
        self._places[name] = place
        return place

    def free(self, name: str) -> Place:
        place = self._places.pop(name)
        self._ranks.free(place.rank_start)
        heapq.heappush(self._slots, place.slot)
        return place

    def move(self, name: str, rank_start: int) -> Place:
        """Raises ValueError if others are in the way."""
        place = self._places[name]
        self._ranks.move(place.rank_start, rank_start)
        self._places[name] = moved = replace(place, rank_start=rank_start)
        return moved

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    @property
    def spans(self) -> list[Span]:
        """Who lies where, in order."""
        spans = [Span(p.rank_start, p.rank_start + padded(p.rank), name) for name, p in self._places.items()]
        return sorted(spans, key=lambda span: span.start)

    @property
    def num_ranks(self) -> int:
        return self._ranks.num_ranks

    @property
    def num_free(self) -> int:
        """Ranks, in whatever ranges."""
        return self._ranks.num_free

    def get(self, name: str) -> Place | None:
        return self._places.get(name)


def window_victims(spans: Sequence[Span], num_ranks: int, size: int, idle: Mapping[str, float]) -> list[str] | None:
    """Whom to evict so that `size` contiguous ranks are free; None if evicting all of `idle` makes none.

    `spans` are in order. `idle` maps those that may be evicted to when they were last used. The window that is made
    free is the one whose most recently used victim has been idle for longest, and only what lies in it is evicted.
    """
    by_age = sorted(idle, key=lambda name: idle[name])
    low, high = 0, len(by_age)
    # More victims never shrink the largest window, so the fewest oldest that make one are found by bisection.
    while low < high:
        count = (low + high) // 2
        if _window(spans, set(by_age[:count]), num_ranks, size) is None:
            low = count + 1
        else:
            high = count
    return _window(spans, set(by_age[:low]), num_ranks, size)


def _window(spans: Sequence[Span], gone: set[str], num_ranks: int, size: int) -> list[str] | None:
    """Names within the first window of `size` ranks that is free once `gone` are; None if there is none."""
    begin = 0
    names: list[str] = []
    for span in spans:
        if span.start - begin >= size:
            return names
        if span.name in gone:
            names.append(span.name)
        else:
            begin, names = span.stop, []
    return names if num_ranks - begin >= size else None
