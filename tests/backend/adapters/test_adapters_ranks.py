# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.adapters.ranks import PAGE, Places, RankAllocator, padded, window_victims

pools = st.integers(1, 12).map(lambda pages: pages * PAGE)


@given(pools, st.lists(st.tuples(st.integers(1, 40), st.integers(0, 99)), max_size=60))
def test_ranges_never_overlap_and_join_again(num_ranks, operations):
    """(rank, n): allocates, or with n > 50 frees the n-th range held."""
    allocator = RankAllocator(num_ranks)
    held: dict[int, int] = {}
    for rank, n in operations:
        if n > 50 and held:
            start = sorted(held)[n % len(held)]
            allocator.free(start)
            del held[start]
            continue
        taken = {r for s, size in held.items() for r in range(s, s + size)}
        free = itertools.groupby(r not in taken for r in range(num_ranks))
        gaps = [len(list(run)) for is_free, run in free if is_free]
        start = allocator.allocate(rank)
        # First fit is complete: a range is refused only if no gap is large enough, which needs joined gaps.
        assert (start is None) == (max(gaps, default=0) < padded(rank))
        if start is not None:
            assert start % PAGE == 0
            assert start + padded(rank) <= num_ranks
            assert taken.isdisjoint(range(start, start + padded(rank)))
            held[start] = padded(rank)
        assert allocator.num_free == num_ranks - sum(held.values())
    for start in held:
        allocator.free(start)
    assert allocator.allocate(num_ranks) == 0


@given(pools, st.lists(st.tuples(st.integers(1, 24), st.integers(0, 99), st.integers(0, 12)), max_size=40))
def test_ranges_move_to_where_nobody_else_is(num_ranks, operations):
    """(rank, n, page): allocates, or with n > 40 moves the n-th range held to that page."""
    allocator = RankAllocator(num_ranks)
    held: dict[int, int] = {}
    for rank, n, page in operations:
        if n <= 40 or not held:
            start = allocator.allocate(rank)
            held |= {} if start is None else {start: padded(rank)}
            continue
        start, to = sorted(held)[n % len(held)], page * PAGE
        size = held.pop(start)
        others = {r for s, other in held.items() for r in range(s, s + other)}
        if to + size <= num_ranks and others.isdisjoint(range(to, to + size)):
            allocator.move(start, to)
            held[to] = size
        else:
            with pytest.raises(ValueError, match=f"^ranks {to} to {to + size} are not free"):
                allocator.move(start, to)
            held[start] = size
        assert allocator.num_free == num_ranks - sum(held.values())
    for start in held:
        allocator.free(start)
    assert allocator.allocate(num_ranks) == 0


def test_misuse():
    allocator = RankAllocator(16)
    with pytest.raises(KeyError):
        allocator.free(0)
    with pytest.raises(ValueError, match=r"^rank: must be at least 1"):
        allocator.allocate(0)
    for bad in (0, 12, -8):
        with pytest.raises(ValueError, match=r"^num_ranks"):
            RankAllocator(bad)


def victims_of(placement: Places, rank: int, idle: dict[str, float]) -> list[str] | None:
    return window_victims(placement.spans, placement.num_ranks, padded(rank), idle)


@st.composite
def crowds(draw):
    num_ranks = draw(pools)
    placement = Places(num_ranks)
    names = [f"a{i}" for i in range(12)]
    for name in names:
        placement.claim(name, draw(st.integers(1, 24)))
    for name in names:
        if placement.get(name) and draw(st.booleans()):
            placement.free(name)
    placed = [name for name in names if placement.get(name)]
    ages = draw(st.permutations(range(len(placed))))
    idle = {name: float(age) for name, age in zip(placed, ages, strict=True) if draw(st.booleans())}
    return num_ranks, placement, placed, idle


@given(crowds(), st.integers(1, 80))
def test_victims_are_the_longest_idle_that_make_room(crowd, rank):
    num_ranks, placement, placed, idle = crowd
    size = padded(rank)
    spans = {
        n: (placement.get(n).rank_start, placement.get(n).rank_start + padded(placement.get(n).rank)) for n in placed
    }

    def inside(begin):
        return {n for n, (start, stop) in spans.items() if start < begin + size and begin < stop}

    windows = [inside(begin) for begin in range(0, num_ranks - size + 1, PAGE)]
    costs = [max((idle[n] for n in w), default=-1.0) for w in windows if w <= set(idle)]
    victims = victims_of(placement, rank, idle)
    if victims is None:
        assert not costs
        return
    assert set(victims) in windows
    assert max((idle[n] for n in victims), default=-1.0) == min(costs)
    for name in victims:
        placement.free(name)
    place = placement.claim("new", rank)
    assert place is not None
    assert place.slot not in {placement.get(n).slot for n in placed if placement.get(n)}
    assert place.slot < num_ranks // PAGE


def test_what_lies_outside_of_the_window_stays():
    placement = Places(32)
    for name in "abcd":
        placement.claim(name, 8)
    idle = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0}
    assert victims_of(placement, 8, idle) == ["a"]
    assert victims_of(placement, 16, idle) == ["c", "d"]
    assert victims_of(placement, 33, idle) is None
    assert window_victims([], 32, 32, {}) == []


def test_a_place_moves_and_keeps_its_slot():
    placement = Places(64)
    for name in "abc":
        placement.claim(name, 12)
    placement.free("b")
    moved = placement.move("c", 16)
    assert (moved.slot, moved.rank_start, moved.rank) == (2, 16, 12)
    assert placement.get("c") == moved
    assert [(span.name, span.start, span.stop) for span in placement.spans] == [("a", 0, 16), ("c", 16, 32)]
    with pytest.raises(ValueError, match=r"^ranks 8 to 24 are not free"):
        placement.move("c", 8)
    assert placement.claim("d", 32).rank_start == 32
