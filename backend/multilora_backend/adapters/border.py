# SPDX-License-Identifier: Apache-2.0
"""Who lies where in the border: the rows of A behind each base weight, for the adapters of the step at hand.

A base GEMM over W with `tier` ranks of A behind it yields x A^T for every adapter whose rows lie there. A larger tier
costs 2 to 10 us a layer in every step, moving an adapter of rank 16 there costs about 20 us once: so the tier is always
the smallest that can hold the step's adapters, whatever has to be moved for it. Rows are copied from the pool, never
within the border, so the moves of one placement may be carried out in any order.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from multilora_backend.adapters.ranks import PAGE, padded

TIERS = (64, 128, 256, 512, 1024)

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Move(Generic[Key]):
    """Copy the adapter's padded ranks to `start` and on."""

    key: Key
    start: int


@dataclass(frozen=True)
class Placement(Generic[Key]):
    """What is to be copied before a step, and where its adapters lie then. Units are ranks. Not to be changed."""

    tier: int
    """0 if the step has no adapters."""
    start: dict[Key, int]
    moves: tuple[Move[Key], ...]


@dataclass
class _Span:
    """An adapter's rows in the border, in pages."""

    first: int
    size: int
    used: int
    """Number of the last change of the step's adapters that wanted it."""

    @property
    def stop(self) -> int:
        return self.first + self.size


class Border(Generic[Key]):
    """Plans only: whoever asks for a placement must carry out its moves, or `clear` all if it may not have.

    A key names content that never changes, such as a slot's generation: another adapter is another key.
    """

    def __init__(self, capacity_ranks: int, tiers: Sequence[int] = TIERS) -> None:
        """`capacity_ranks`: how many ranks the weights have room for; larger tiers are never used."""
        if any(tier % PAGE or tier <= 0 for tier in tiers) or sorted(set(tiers)) != list(tiers):
            raise ValueError(f"tiers: must be ascending multiples of {PAGE}, got {tiers}")
        self.tiers = tuple(tier for tier in tiers if tier <= capacity_ranks)
        if not self.tiers:
            raise ValueError(f"capacity_ranks: must hold the smallest tier of {tiers}, got {capacity_ranks}")
        self._spans: dict[Key, _Span] = {}
        self._changes = 0
        self._wanted: dict[Key, int] = {}
        self._steady: Placement[Key] = Placement(0, {}, ())

    def place(self, wanted: Mapping[Key, int]) -> Placement[Key] | None:
        """Places the adapters of a step, {key: rank}; None, and no change, if they exceed the largest tier.

        Adapters that are not wanted stay where they are until their room is needed; the longest unused go first.
        """
        if wanted == self._wanted:
            return self._steady
        sizes = {key: padded(rank) // PAGE for key, rank in wanted.items()}
        total = PAGE * sum(sizes.values())
        tier = next((tier for tier in (0, *self.tiers) if tier >= total), None)
        if tier is None:
            return None
        self._changes += 1
        moved = self._move_in(sizes, tier // PAGE)
        for key in sizes:
            self._spans[key].used = self._changes
        self._wanted = dict(wanted)
        start = {key: self._spans[key].first * PAGE for key in sizes}
        self._steady = Placement(tier, start, ())
        return Placement(tier, start, tuple(Move(key, start[key]) for key in moved))

    def forget(self, key: Key) -> None:
        """The adapter was evicted or rewritten: its rows are of no use any more. Unknown keys are ignored."""
        self._spans.pop(key, None)
        if key in self._wanted:
            self._wanted, self._steady = {}, Placement(0, {}, ())

    def clear(self) -> None:
        """Moves may not have been carried out: nothing is known of what lies where, and all that is wanted is moved."""
        self._spans.clear()
        self._wanted, self._steady = {}, Placement(0, {}, ())

    def _move_in(self, sizes: dict[Key, int], pages: int) -> list[Key]:
        """Brings everything within the first `pages`; returns what has to be copied for that."""
        spans = self._spans
        # Smallest last: if the gaps between them are too small, those are the cheapest to move.
        kept = [key for key in sizes if key in spans and spans[key].stop <= pages and spans[key].size == sizes[key]]
        kept.sort(key=lambda key: -sizes[key])
        placed = self._fit(sizes, set(kept), pages, by_age=True)
        if placed is None:
            placed = self._fit(sizes, set(kept), pages, by_age=False)
        more = 1
        while placed is None:
            # Twice as many each time give up their place; once all have, one gap is left that holds everything.
            del kept[max(0, len(kept) - more) :]
            more *= 2
            placed = self._fit(sizes, set(kept), pages, by_age=False)
        taken = {page for key, first in placed.items() for page in range(first, first + sizes[key])}
        for key, span in list(spans.items()):
            if key in placed or (key not in sizes and not taken.isdisjoint(range(span.first, span.stop))):
                del spans[key]
        for key, first in placed.items():
            spans[key] = _Span(first, sizes[key], self._changes)
        return list(placed)

    def _fit(self, sizes: dict[Key, int], kept: set[Key], pages: int, by_age: bool) -> dict[Key, int] | None:
        """First pages for all that is not kept: the largest first, each at the lowest page whose loss hurts least."""
        never = self._changes
        age = [0] * pages
        for key, span in self._spans.items():
            if key in kept or (by_age and key not in sizes):
                used = never if key in kept else span.used
                for page in range(span.first, min(span.stop, pages)):
                    age[page] = used
        placed: dict[Key, int] = {}
        for key in sorted((key for key in sizes if key not in kept), key=lambda key: -sizes[key]):
            size = sizes[key]
            best, hurt = 0, never
            for first in range(pages - size + 1):
                newest = max(age[first : first + size])
                if newest < hurt:
                    best, hurt = first, newest
                    if not hurt:
                        break
            if hurt == never:
                return None
            placed[key] = best
            age[best : best + size] = [never] * size
        return placed
