# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.adapters.compaction import Room, Shift, _run, plan_room
from multilora_backend.adapters.ranks import PAGE, Places, padded, window_victims
from profiles import examples


def pool(layout: str) -> Places:
    """`"aa..bbb"`: a page a letter; dots are free."""
    places = Places(len(layout) * PAGE)
    names = list(dict.fromkeys(layout.replace(".", "")))
    for name in names:
        places.claim(name, layout.count(name) * PAGE)
    # From the end on, so that nobody is in the way of anybody.
    for name in reversed(names):
        places.move(name, layout.index(name) * PAGE)
    return places


def drawn(places: Places) -> str:
    pages = ["."] * (places.num_ranks // PAGE)
    for span in places.spans:
        for page in range(span.start // PAGE, span.stop // PAGE):
            assert pages[page] == "."
            pages[page] = span.name
    return "".join(pages)


def carry_out(places: Places, room) -> str:
    for name in room.evict:
        places.free(name)
    for shift in room.shifts:
        places.move(shift.name, shift.start)
    return drawn(places)


def plan(places: Places, pages: int, idle: str = "", fixed: str = ""):
    ages = {name: float(age) for age, name in enumerate(idle)}
    return plan_room(places.spans, places.num_ranks, pages * PAGE, ages, fixed)


def test_nothing_is_done_where_a_range_is_free():
    room = plan(pool("aa..b"), 2, idle="ab")
    assert (room.evict, room.shifts) == ((), ())


def test_a_window_is_moved_aside_where_that_is_less_than_moving_together():
    places = pool(".a.bbbb..cc.d")
    room = plan(places, 3)
    assert room == Room((), (Shift("a", 11 * PAGE),))
    assert carry_out(places, room) == "...bbbb..ccad"
    places = pool(".a.bbbb..cc.d")
    assert carry_out(places, plan(places, 3, fixed="a")) == ".a.bbbbcc...d"


def test_the_cheapest_neighbours_move_together():
    places = pool("a..bbb..c.....")
    assert carry_out(places, plan(places, 7)) == "a..bbbc......."
    places = pool(".aaaa.bb.cccc")
    assert carry_out(places, plan(places, 2)) == ".aaaabb..cccc"
    places = pool("ab.c.dddd.")
    assert carry_out(places, plan(places, 2)) == "abc..dddd."


def test_everything_moves_together_where_no_gap_holds_anybody():
    places = pool("a.bbb.cccc.dddd")
    assert carry_out(places, plan(places, 3)) == "abbbcccc...dddd"
    places = pool(".aa.bb.cc.")
    assert carry_out(places, plan(places, 4)) == "aabbcc...."


def test_what_is_on_its_way_stays_and_bounds_what_moves():
    places = pool(".a.bb.c.")
    assert plan(places, 4, fixed="b") is None
    room = plan(places, 2, fixed="b")
    assert len(room.shifts) == 1
    assert {shift.name for shift in room.shifts} <= {"a", "c"}
    assert "bb" in carry_out(places, room)[3:5]


def test_the_longest_idle_go_and_only_those_that_help():
    places = pool("abccddee")
    # b is older than c, but its page is no help to two more than c's alone.
    room = plan(places, 2, idle="bcd")
    assert room.evict == ("c",)
    places = pool("abcdefgh")
    room = plan(places, 3, idle="hbec")
    assert set(room.evict) == {"h", "b", "e"}
    assert "..." in carry_out(places, room)


def test_eviction_as_it_lies_where_moving_costs_more_than_it_spares():
    names = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP"
    places = pool("." + "".join(2 * name for name in names) + ".")
    # Two free pages at the two ends: evicting one more adapter is cheaper than moving all 42.
    room = plan(places, 2, idle="d")
    assert (room.evict, room.shifts) == (("d",), ())
    assert plan(places, 2).shifts


def test_none_where_even_all_of_it_is_too_little():
    places = pool("aabb..")
    assert plan(places, 5, idle="a") is None
    assert plan(places, 7, idle="ab") is None
    assert plan(places, 4, idle="a").evict == ("a",)


@st.composite
def crowds(draw):
    num_ranks = draw(st.integers(1, 16)) * PAGE
    places = Places(num_ranks)
    names = [f"a{i}" for i in range(14)]
    for name in names:
        places.claim(name, draw(st.integers(1, 32)))
    for name in names:
        if places.get(name) and draw(st.booleans()):
            places.free(name)
    placed = list(places)
    ages = draw(st.permutations(range(len(placed))))
    roles = [draw(st.sampled_from(["idle", "leased", "fixed"])) for _ in placed]
    idle = {name: float(age) for name, age, role in zip(placed, ages, roles, strict=True) if role == "idle"}
    return places, idle, {name for name, role in zip(placed, roles, strict=True) if role == "fixed"}


@given(crowds(), st.integers(1, 100))
@examples(200)
def test_room_is_made_whenever_it_can_be(crowd, rank):
    places, idle, fixed = crowd
    before, slots = {n: places.get(n).rank_start for n in places}, {n: places.get(n).slot for n in places}
    room = plan_room(places.spans, places.num_ranks, rank, idle, fixed)
    if room is None:
        left = [span for span in places.spans if span.name not in idle]
        assert _run(left, places.num_ranks, padded(rank), fixed) is None
        assert window_victims(places.spans, places.num_ranks, padded(rank), idle) is None
        if not fixed:
            assert sum(span.size for span in left) + padded(rank) > places.num_ranks
        return
    assert set(room.evict) <= set(idle)
    assert len(set(room.evict)) == len(room.evict)
    assert fixed.isdisjoint(shift.name for shift in room.shifts)
    assert set(room.evict).isdisjoint(shift.name for shift in room.shifts)
    carry_out(places, room)
    assert all(places.get(name).slot == slots[name] for name in places)
    assert all(places.get(name).rank_start == before[name] for name in fixed)
    assert places.claim("new", rank) is not None


@given(crowds(), st.integers(1, 100))
@examples(100)
def test_the_run_found_is_the_cheapest(crowd, rank):
    places, _, fixed = crowd
    spans, size = places.spans, padded(rank)

    def free(i: int, j: int) -> int:
        end = spans[j].start if j < len(spans) else places.num_ranks
        return end - (spans[i - 1].stop if i else 0) - sum(span.size for span in spans[i:j])

    runs = [
        sum(span.size for span in spans[i:j])
        for i in range(len(spans) + 1)
        for j in range(i, len(spans) + 1)
        if fixed.isdisjoint(span.name for span in spans[i:j]) and free(i, j) >= size
    ]
    found = _run(spans, places.num_ranks, size, fixed)
    assert (found is None) == (not runs)
    if found is not None:
        assert sum(span.size for span in spans[found[0] : found[1]]) == min(runs)
