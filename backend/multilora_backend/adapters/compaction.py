# SPDX-License-Identifier: Apache-2.0
"""How to make one contiguous range of ranks out of free ranges that add up: whom to move where, and whom to evict.

Pure functions over who lies where. Fragmentation needs adapters of different ranks: what rank 8 left in many places
holds no rank 64. Then those in the way are moved aside, on the device, which costs less than to evict and load again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from multilora_backend.adapters.ranks import Span, padded, window_victims

MOVE_COST = 1 / 20
"""Of the cost of an eviction of as many ranks, which is a load later on. An estimate: device memory moves a byte at 30
times (read and written, 1.6 TB/s of an H200) what the link from the host does, and launches take their part."""
MAX_WINDOWS = 64
"""Windows tried for moving aside; then everything is moved together."""


@dataclass(frozen=True)
class Shift:
    """Move the adapter so that its ranks begin at `start`."""

    name: str
    start: int


@dataclass(frozen=True)
class Room:
    """First evict, then shift in this order; then there is a free range for what it was planned for."""

    evict: tuple[str, ...] = ()
    shifts: tuple[Shift, ...] = ()


def plan_room(
    spans: Sequence[Span], num_ranks: int, rank: int, idle: Mapping[str, float], fixed: Collection[str] = ()
) -> Room | None:
    """The cheapest way to a contiguous range for `rank`; None if there is none.

    `spans` are in order. `idle` maps those that may be evicted to when they were last used, `fixed` may not be moved:
    their weights are on their way to where they lie. Everybody else may be moved, also while in use.

    As few as possible are evicted, those idle for longest; if that takes more moving than it spares evicting, a window
    is evicted as it lies (`window_victims`).
    """
    size = padded(rank)
    if size > num_ranks:
        return None
    victims = window_victims(spans, num_ranks, size, idle)
    evict = _fewest(spans, num_ranks, size, idle, fixed)
    if evict is None:
        return None if victims is None else Room(tuple(victims))
    shifts = _shifts([span for span in spans if span.name not in evict], num_ranks, size, fixed)
    if victims is not None:
        sizes = {span.name: span.size for span in spans}
        spared = sum(sizes[name] for name in victims) - sum(sizes[name] for name in evict)
        if spared <= MOVE_COST * sum(sizes[shift.name] for shift in shifts):
            return Room(tuple(victims))
    return Room(tuple(evict), tuple(shifts))


def _fewest(
    spans: Sequence[Span], num_ranks: int, size: int, idle: Mapping[str, float], fixed: Collection[str]
) -> list[str] | None:
    """Whom to evict so that moving makes room: the longest idle, without those of them that would not help."""
    there = {span.name for span in spans}
    by_age = sorted((name for name in idle if name in there), key=lambda name: idle[name])

    def enough(gone: Iterable[str]) -> bool:
        absent = set(gone)
        return _run([span for span in spans if span.name not in absent], num_ranks, size, fixed) is not None

    low, high = 0, len(by_age)
    while low < high:
        count = (low + high) // 2
        low, high = (low, count) if enough(by_age[:count]) else (count + 1, high)
    evict = by_age[:low]
    if not enough(evict):
        return None
    for name in reversed(by_age[: max(low - 1, 0)]):
        if enough(other for other in evict if other != name):
            evict.remove(name)
    return evict


def _shifts(spans: list[Span], num_ranks: int, size: int, fixed: Collection[str]) -> list[Shift]:
    """The moves that cost least, when there is a `_run`: a window moved aside, or a run moved together."""
    run = _run(spans, num_ranks, size, fixed)
    assert run is not None
    together = _slide(spans[run[0] : run[1]], spans[run[0] - 1].stop if run[0] else 0)
    if not together:
        return []
    sizes = {span.name: span.size for span in spans}
    aside = _aside(spans, num_ranks, size, fixed, sum(sizes[shift.name] for shift in together))
    return together if aside is None else aside


def _run(spans: Sequence[Span], num_ranks: int, size: int, fixed: Collection[str]) -> tuple[int, int] | None:
    """Neighbours spans[i:j], none of them fixed, between and beside which `size` ranks are free; the fewest ranks.

    Two pointers: the free ranks around spans[i:j] are those from the end of i - 1 to the start of j, less its own.
    """
    best: tuple[int, int] | None = None
    least = num_ranks + 1
    i, own = 0, 0
    for j in range(len(spans) + 1):
        end = spans[j].start if j < len(spans) else num_ranks
        while i <= j and end - (spans[i - 1].stop if i else 0) - own >= size:
            if own < least:
                best, least = (i, j), own
            own -= spans[i].size if i < j else 0
            i += 1
        if j < len(spans):
            if spans[j].name in fixed:
                i, own = j + 1, 0
            elif i <= j:
                own += spans[j].size
            else:
                i, own = j + 1, 0
    return best


def _slide(spans: Sequence[Span], begin: int) -> list[Shift]:
    shifts = []
    for span in spans:
        if span.start != begin:
            shifts.append(Shift(span.name, begin))
        begin += span.size
    return shifts


def _aside(spans: Sequence[Span], num_ranks: int, size: int, fixed: Collection[str], below: int) -> list[Shift] | None:
    """Moves out of one window into free ranges beside it that cost less than `below` ranks; None if there are none."""
    starts, stops = [span.start for span in spans], [span.stop for span in spans]
    before = [0, *accumulate(span.size for span in spans)]
    windows = []
    for begin in {0, *stops, *(start - size for start in starts)}:
        if 0 <= begin <= num_ranks - size:
            i, j = bisect_right(stops, begin), bisect_right(starts, begin + size - 1)
            windows.append((before[j] - before[i], begin, i, j))
    for cost, begin, i, j in islice(sorted(windows), MAX_WINDOWS):
        if cost >= below:
            return None
        if all(span.name not in fixed for span in spans[i:j]):
            shifts = _into_gaps(spans[i:j], _gaps(spans, num_ranks, begin, begin + size))
            if shifts is not None:
                return shifts
    return None


def _gaps(spans: Sequence[Span], num_ranks: int, begin: int, stop: int) -> list[tuple[int, int]]:
    """(size, start) of the free ranges outside of [begin, stop)."""
    gaps, last = [], 0
    for start, end in sorted([*((span.start, span.stop) for span in spans), (begin, stop), (num_ranks, num_ranks)]):
        if start > last:
            gaps.append((start - last, last))
        last = max(last, end)
    return gaps


def _into_gaps(spans: Sequence[Span], gaps: list[tuple[int, int]]) -> list[Shift] | None:
    """The largest first, each into the smallest gap that holds it; None if one finds none."""
    shifts = []
    for span in sorted(spans, key=lambda span: -span.size):
        fitting = min((gap for gap in gaps if gap[0] >= span.size), default=None)
        if fitting is None:
            return None
        gaps.remove(fitting)
        gaps.append((fitting[0] - span.size, fitting[1] + span.size))
        shifts.append(Shift(span.name, fitting[1]))
    return shifts
