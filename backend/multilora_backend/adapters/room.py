# SPDX-License-Identifier: Apache-2.0
"""Places for adapters that may have extras: a slot and a range of ranks, and a range of the extras' arena or none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from multilora_backend.adapters.compaction import Shift, plan_room
from multilora_backend.adapters.ranks import PAGE, Place, Places, RankAllocator, Span, padded

GRAIN_BYTES = 4096
"""The arena is handed out in pieces of this size: one is to it what a page of ranks is to the pool."""


@dataclass(frozen=True)
class Clearing:
    """First evict, then shift in this order; then there is a place for what it was planned for."""

    evict: tuple[str, ...]
    shifts: tuple[Shift, ...]
    """In ranks."""
    extras_shifts: tuple[Shift, ...]
    """In units of the arena, for `Room.move_extras`."""


class Room(Places):
    """An adapter has both ranges or neither. Extras reuse the allocator of ranks, PAGE of its units to a grain."""

    def __init__(self, num_ranks: int, extras_bytes: int) -> None:
        super().__init__(num_ranks)
        self._num_units = extras_bytes // GRAIN_BYTES * PAGE
        self._units = RankAllocator(self._num_units) if self._num_units else None
        self._extras: dict[str, Place] = {}

    def claim(self, name: str, rank: int, extras_bytes: int = 0) -> Place | None:
        """A place for an adapter that has none; None, and no change, if there is no contiguous room."""
        place = super().claim(name, rank)
        if place is None or not extras_bytes:
            return place
        start = None if self._units is None else self._units.allocate(_units(extras_bytes))
        if start is None:
            super().free(name)
            return None
        self._extras[name] = Place(place.slot, start, _units(extras_bytes))
        return place

    def free(self, name: str) -> Place:
        extras = self._extras.pop(name, None)
        if extras is not None and self._units is not None:
            self._units.free(extras.rank_start)
        return super().free(name)

    def clear_for(
        self, rank: int, extras_bytes: int, idle: Mapping[str, float], fixed: Collection[str] = ()
    ) -> Clearing | None:
        """The cheapest way to a place for that rank and extras; None if there is none. See `compaction.plan_room`.

        Whoever goes for the arena's sake leaves its ranks as well, so the arena comes first.
        """
        evict: tuple[str, ...] = ()
        extras_shifts: tuple[Shift, ...] = ()
        if extras_bytes:
            there = {name: used for name, used in idle.items() if name in self._extras}
            arena = plan_room(self.extras_spans, self._num_units, _units(extras_bytes), there, fixed)
            if arena is None:
                return None
            evict, extras_shifts = arena.evict, arena.shifts
        spans = [span for span in self.spans if span.name not in evict]
        rest = {name: used for name, used in idle.items() if name not in evict}
        ranks = plan_room(spans, self.num_ranks, rank, rest, fixed)
        if ranks is None:
            return None
        extras_shifts = tuple(shift for shift in extras_shifts if shift.name not in ranks.evict)
        return Clearing(evict + ranks.evict, ranks.shifts, extras_shifts)

    def move_extras(self, name: str, start: int) -> Place:
        """`start` as in an `extras_shift`. Raises ValueError if others are in the way."""
        place = self._extras[name]
        assert self._units is not None
        self._units.move(place.rank_start, start)
        self._extras[name] = replace(place, rank_start=start)
        return self._extras[name]

    @property
    def extras_spans(self) -> list[Span]:
        """Who lies where in the arena, in order."""
        spans = [Span(p.rank_start, p.rank_start + padded(p.rank), name) for name, p in self._extras.items()]
        return sorted(spans, key=lambda span: span.start)

    def extras_start(self, name: str) -> int:
        """The first byte of an adapter's extras in the arena; 0 if it has none."""
        place = self._extras.get(name)
        return 0 if place is None else place.rank_start // PAGE * GRAIN_BYTES

    @property
    def extras_nbytes(self) -> int:
        """Taken or reserved."""
        return sum(place.rank for place in self._extras.values()) // PAGE * GRAIN_BYTES

    def holds(self, name: str, rank: int, extras_bytes: int) -> bool:
        """Whether the adapter's place is one for exactly that rank and extras."""
        place, extras = self.get(name), self._extras.get(name)
        units = 0 if extras is None else extras.rank
        return place is not None and place.rank == rank and units == _units(extras_bytes)


def extras_can_ever_fit(size: int, arena_bytes: int) -> bool:
    return _units(size) <= arena_bytes // GRAIN_BYTES * PAGE


def grains(size: int) -> int:
    """Bytes of the arena that extras of `size` bytes take."""
    return -(-size // GRAIN_BYTES) * GRAIN_BYTES


def _units(size: int) -> int:
    return grains(size) // GRAIN_BYTES * PAGE
