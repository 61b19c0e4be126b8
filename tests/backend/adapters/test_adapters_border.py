# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.adapters.border import Border, Move
from multilora_backend.adapters.ranks import padded

CAPACITY, TIERS = 128, (16, 32, 64, 128)
keys = st.integers(0, 11)
mixed_ranks = st.lists(st.integers(1, 40), min_size=12, max_size=12)
equal_ranks = st.integers(1, 40).map(lambda rank: [rank] * 12)
steps = st.lists(st.sets(keys, max_size=8) | keys.map(lambda key: -1 - key) | st.none(), max_size=30)
"""What a step wants, or -1 - key to forget, or None: nothing that lies there can be relied on."""


class Columns:
    """The border itself: whose rank lies in each column, as the moves have it."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self.owner: list[tuple[int, int] | None] = [None] * CAPACITY

    def hold(self, key: int, start: int) -> bool:
        size = padded(self.ranks[key])
        return self.owner[start : start + size] == [(key, j) for j in range(size)]

    def copy(self, move: Move[int]) -> None:
        size = padded(self.ranks[move.key])
        # What it leaves behind is still its own, but a border remembers one place for each.
        self.owner = [None if own is not None and own[0] == move.key else own for own in self.owner]
        self.owner[move.start : move.start + size] = [(move.key, j) for j in range(size)]

    def intact(self, key: int, tier: int) -> bool:
        return any(self.hold(key, start) for start in range(tier - padded(self.ranks[key]) + 1))


@given(mixed_ranks | equal_ranks, steps)
def test_every_wanted_adapter_is_whole_and_the_tier_the_smallest(ranks, steps):
    border: Border[int] = Border(CAPACITY + 8, (*TIERS, 256))
    columns = Columns(ranks)
    forgotten: set[int] = set()
    for step in steps:
        if step is None:
            border.clear()
            columns = Columns(ranks)
            continue
        if isinstance(step, int):
            border.forget(-1 - step)
            forgotten.add(-1 - step)
            continue
        wanted = {key: ranks[key] for key in step}
        total = sum(padded(rank) for rank in wanted.values())
        placement = border.place(wanted)
        if placement is None:
            assert total > CAPACITY
            continue
        assert placement.tier == min(tier for tier in (0, *TIERS) if tier >= total)
        assert placement.start.keys() == step
        moved = [move.key for move in placement.moves]
        assert len(set(moved)) == len(moved)
        stale = {key for key in step & forgotten if key not in moved}
        assert not stale
        intact = {key for key in step if columns.intact(key, placement.tier)} - forgotten
        if intact == step:
            assert not moved
        if len(set(ranks)) == 1:  # ranges of one size leave no gaps between them
            assert intact.isdisjoint(moved)
        for move in placement.moves:
            columns.copy(move)
        for key, start in placement.start.items():
            assert start + padded(ranks[key]) <= placement.tier
            assert columns.hold(key, start)
        forgotten -= step
        again = border.place(dict(wanted))
        assert (again.tier, again.start, again.moves) == (placement.tier, placement.start, ())


def test_what_is_not_wanted_stays_and_the_longest_unused_goes_first():
    border: Border[str] = Border(64, (64,))
    assert border.place({"a": 16, "b": 16, "c": 16}).start == {"a": 0, "b": 16, "c": 32}
    for key in "bca":
        assert border.place({key: 16}).moves == ()
    # 48.. is free; then b is the one unused for longest, then c.
    for key, start in [("d", 48), ("e", 16), ("f", 32)]:
        assert border.place({key: 9, "a": 16}).moves == (Move(key, start),)
    assert border.place({"e": 9, "f": 9, "a": 16, "d": 9}).moves == ()
    assert border.place({"b": 16, "c": 16, "e": 9, "f": 9}).moves == (Move("b", 0), Move("c", 48))


def test_a_smaller_tier_is_worth_moving_for():
    border: Border[str] = Border(64, (16, 64))
    assert border.place({"a": 8, "b": 8, "c": 8}).tier == 64
    placement = border.place({"b": 8, "c": 8})
    assert (placement.tier, placement.start, placement.moves) == (16, {"b": 8, "c": 0}, (Move("c", 0),))


def test_gaps_that_are_too_small_are_joined_by_moving_the_smallest():
    border: Border[str] = Border(64, (64,))
    assert border.place({"a": 24, "b": 16, "c": 16, "d": 8}).start == {"a": 0, "b": 24, "c": 40, "d": 56}
    # Free are 24..40 and 56..64.
    placement = border.place({"a": 24, "c": 16, "e": 24})
    assert placement.moves == (Move("e", 24), Move("c", 48))


def test_too_much_changes_nothing():
    border: Border[str] = Border(72, (16, 64, 128))
    placement = border.place({"a": 16, "b": 16})
    assert border.place({"a": 16, "b": 16, "c": 40}) is None
    assert border.place({"a": 16, "b": 16}).start == placement.start
    assert border.place({"b": 16}).moves == (Move("b", 0),)
    assert border.place({}) == Border(64, (64,)).place({})


def test_forgotten_is_copied_again():
    border: Border[str] = Border(64, (64,))
    border.place({"a": 16})
    border.forget("a")
    border.forget("unknown")
    assert border.place({"a": 16}).moves == (Move("a", 0),)


def test_after_a_step_that_failed_everything_is_copied_again():
    border: Border[str] = Border(64, (64,))
    border.place({"a": 16})
    border.place({"b": 16, "c": 8})
    border.clear()
    assert border.place({"b": 16, "c": 8}).moves == (Move("b", 0), Move("c", 16)), "as in the step before"
    assert border.place({"a": 16}).moves == (Move("a", 24),)
    assert border.place({"b": 16, "c": 8}).moves == ()


@pytest.mark.parametrize(("capacity", "tiers", "field"), [(8, (16,), "capacity_ranks"), (99, (16, 12), "tiers")])
def test_misuse(capacity, tiers, field):
    with pytest.raises(ValueError, match=f"^{field}: must"):
        Border(capacity, tiers)
