# SPDX-License-Identifier: Apache-2.0
"""Who lies where in the device pool's rank dimension: pages of 8 ranks, contiguous ranges, in plain Python.

Eight ranks are the grain because a kernel's tile over ranks is a multiple of it; an adapter of rank 4 therefore
costs as much memory as one of rank 8, but is computed at rank 4.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping
from dataclasses import dataclass

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
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[index : index + 1] = [(start + size, stop)] if start + size < stop else []
                self._used[start] = start + size
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


@dataclass(frozen=True)
class Place:
    """Where an adapter lies: its row in the pool's tables, and its ranks."""

    slot: int
    rank_start: int
    rank: int


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

    def victims(self, rank: int, idle: Mapping[str, float]) -> list[str] | None:
        return choose_victims(self._places, idle, self._ranks.num_ranks, rank)

    def get(self, name: str) -> Place | None:
        return self._places.get(name)


def choose_victims(
    places: Mapping[str, Place], idle: Mapping[str, float], num_ranks: int, rank: int
) -> list[str] | None:
    """Whom to evict so that a contiguous range for `rank` appears; None if evicting all of `idle` makes none.

    `idle` maps those that may be evicted to when they were last used. The window that is made free is the one
    whose most recently used victim has been idle for longest, and only what lies in it is evicted. (Where free
    ranges would add up, moving adapters together instead of evicting is the place for compaction.)
    """
    by_place = sorted(places.items(), key=lambda item: item[1].rank_start)
    by_age = sorted(idle, key=lambda name: idle[name])
    low, high = 0, len(by_age)
    # More victims never shrink the largest window, so the fewest oldest that make one are found by bisection.
    while low < high:
        count = (low + high) // 2
        if _window(by_place, set(by_age[:count]), num_ranks, padded(rank)) is None:
            low = count + 1
        else:
            high = count
    return _window(by_place, set(by_age[:low]), num_ranks, padded(rank))


def _window(by_place: list[tuple[str, Place]], gone: set[str], num_ranks: int, size: int) -> list[str] | None:
    """Names within the first window of `size` ranks that is free once `gone` are; None if there is none."""
    begin = 0
    names: list[str] = []
    for name, place in by_place:
        if place.rank_start - begin >= size:
            return names
        if name in gone:
            names.append(name)
        else:
            begin, names = place.rank_start + padded(place.rank), []
    return names if num_ranks - begin >= size else None
