# SPDX-License-Identifier: Apache-2.0
"""Places for adapters that may have extras: a slot and a range of ranks, and a range of the extras' arena or none."""

from __future__ import annotations

from collections.abc import Mapping

from multilora_backend.adapters.ranks import PAGE, Place, Places, RankAllocator, choose_victims

GRAIN_BYTES = 4096
"""The arena is handed out in pieces of this size: one is to it what a page of ranks is to the pool."""


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

    def victims(self, rank: int, idle: Mapping[str, float], extras_bytes: int = 0) -> list[str] | None:
        """Whom to evict for an adapter of that rank and extras; None if evicting all of `idle` is not enough."""
        victims = super().victims(rank, idle)
        if victims is None or not extras_bytes:
            return victims
        kept = {name: place for name, place in self._extras.items() if name not in victims}
        rest = {name: used for name, used in idle.items() if name in kept}
        more = choose_victims(kept, rest, self._num_units, _units(extras_bytes))
        return None if more is None else victims + more

    def extras_start(self, name: str) -> int:
        """The first byte of an adapter's extras in the arena; 0 if it has none."""
        place = self._extras.get(name)
        return 0 if place is None else place.rank_start // PAGE * GRAIN_BYTES

    def holds(self, name: str, rank: int, extras_bytes: int) -> bool:
        """Whether the adapter's place is one for exactly that rank and extras."""
        place, extras = self.get(name), self._extras.get(name)
        units = 0 if extras is None else extras.rank
        return place is not None and place.rank == rank and units == _units(extras_bytes)


def extras_can_ever_fit(size: int, arena_bytes: int) -> bool:
    return _units(size) <= arena_bytes // GRAIN_BYTES * PAGE


def _units(size: int) -> int:
    """Whole grains."""
    return -(-size // GRAIN_BYTES) * PAGE
