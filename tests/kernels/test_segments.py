# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_kernels import (
    ANY_RANKS,
    FEW_RANKS,
    SegmentPlan,
    block_m_for,
    max_packed,
    max_tiles,
    padded_rank,
    plan_segments,
    rank_block_for,
)
from multilora_kernels.variants import BLOCK_M_CHOICES


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """rows, rank_start, rank, h_start as plan_segments takes them."""
    ranks = draw(st.lists(st.integers(0, 70), max_size=6))
    rows = draw(st.lists(st.integers(-1, len(ranks) - 1), max_size=200))
    starts = np.cumsum([0, *map(padded_rank, ranks)])[: len(ranks)].astype(np.int32)
    h_start = draw(st.sampled_from([None, starts[::-1].copy()]))
    return np.array(rows, np.int32), starts, np.array(ranks, np.int32), h_start


def plan_of(batch: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None], block_m: int) -> SegmentPlan:
    rows, rank_start, rank, h_start = batch
    return plan_segments(rows, rank_start, rank, block_m, h_start)


def adapter_of(slot: int, rank: np.ndarray) -> int:
    return slot if slot >= 0 and rank[slot] > 0 else -1


@given(batches(), st.sampled_from(BLOCK_M_CHOICES))
def test_order_has_every_token_once_sorted_by_adapter_and_those_without_first(batch, block_m):
    rows, _, rank, _ = batch
    plan = plan_of(batch, block_m)
    assert plan.num_tokens == len(rows)
    assert list(plan.order) == sorted(range(len(rows)), key=lambda t: adapter_of(rows[t], rank)), "stably"
    present = {adapter_of(slot, rank) for slot in rows.tolist()} - {-1}
    assert plan.active == tuple(sorted(present))
    assert plan.max_rank == max((rank[slot] for slot in present), default=0)
    assert plan.rank_block == rank_block_for(plan.max_rank)


@given(batches(), st.sampled_from(BLOCK_M_CHOICES))
def test_tiles_cover_all_rows_in_order_each_of_one_adapter(batch, block_m):
    rows, rank_start, rank, h_start = batch
    plan = plan_of(batch, block_m)
    tiles = plan.tiles.tolist()
    assert plan.tiles.shape == (plan.num_tiles, 8)
    assert [row for first, end, *_ in tiles for row in range(first, end)] == list(range(len(rows)))
    for first, end, *fields in tiles:
        assert 0 < end - first <= block_m
        slots = {adapter_of(rows[token], rank) for token in plan.order[first:end]}
        assert len(slots) == 1, "one adapter a tile"
        slot = slots.pop()
        if slot < 0:
            assert fields == [0] * 6
        elif h_start is None:
            assert fields == [rank_start[slot], rank[slot], 0, plan.h_ranks, slot, 0]
        else:
            assert fields == [rank_start[slot], rank[slot], h_start[slot], padded_rank(rank[slot]), slot, 0]
    sizes = np.unique([adapter_of(slot, rank) for slot in rows.tolist()], return_counts=True)[1]
    assert plan.num_tiles == sum(-(-size // block_m) for size in sizes), "no more tiles than needed"
    assert plan.num_tiles <= max_tiles(len(rows), len(sizes), block_m)


@given(batches())
def test_h_of_the_grouped_shrink_holds_the_largest_rank_in_whole_blocks(batch):
    plan = plan_of(batch, 16)
    assert plan.h_ranks % plan.rank_block == 0
    assert plan.max_rank <= plan.h_ranks < plan.max_rank + plan.rank_block


@given(batches(), st.sampled_from(BLOCK_M_CHOICES))
def test_groups_are_the_tiles_of_each_adapter_as_one(batch, block_m):
    plan = plan_of(batch, block_m).pad_to(300)
    assert len(plan.groups) == len(plan.active)
    for group, slot in zip(plan.groups.tolist(), plan.active, strict=True):
        own = [tile for tile in plan.tiles.tolist() if tile[3] > 0 and tile[2] == batch[1][slot]]
        assert group == [own[0][0], own[-1][1], *own[0][2:]]
    found = list(plan.to("cpu").by_adapter())
    assert [group for group, _ in found] == plan.groups.tolist()
    for (first, end, *_), tokens in found:
        assert tokens.tolist() == plan.order[first:end].tolist()


@given(batches(), st.integers(0, 5))
def test_padding_adds_empty_tiles_and_changes_nothing_else(batch, more):
    plan = plan_of(batch, 16)
    padded = plan.pad_to(plan.num_tiles + more)
    np.testing.assert_array_equal(padded.tiles[: plan.num_tiles], plan.tiles)
    assert (padded.tiles[plan.num_tiles :] == 0).all()
    np.testing.assert_array_equal(padded.order, plan.order)
    assert padded.packed.size == (8 + 16) * padded.num_tiles
    assert (padded.rows[plan.num_tiles :] == -1).all()


def test_a_plan_does_not_fit_into_fewer_tiles_than_it_has():
    plan = plan_segments(np.zeros(40, np.int32), np.zeros(1, np.int32), np.full(1, 8, np.int32), 16)
    with pytest.raises(ValueError, match="num_tiles: the plan has 3 tiles, 2 cannot hold them"):
        plan.pad_to(2)


@given(batches())
def test_views_on_a_device_are_the_packed_buffer(batch):
    plan = plan_of(batch, 16)
    assert plan.packed.dtype == np.int32
    segments = plan.to("cpu")
    np.testing.assert_array_equal(segments.tiles.numpy(), plan.tiles)
    np.testing.assert_array_equal(segments.rows.numpy(), plan.rows)


def test_a_step_without_adapters_is_one_group_of_rank_0():
    no_slots = np.empty(0, np.int32)
    plan = plan_segments(np.full(20, -1, np.int32), no_slots, no_slots, 16)
    assert plan.tiles.tolist() == [[0, 16, *[0] * 6], [16, 20, *[0] * 6]]
    assert (plan.max_rank, plan.h_ranks, plan.active) == (0, 0, ())
    assert len(plan.groups) == 0


def test_cost_does_not_grow_with_adapters_that_are_not_in_the_step():
    rows = np.array([3, 3], np.int32)
    few = plan_segments(rows, np.arange(4, dtype=np.int32) * 8, np.full(4, 8, np.int32), 16)
    many = plan_segments(rows, np.arange(50_000, dtype=np.int32) * 8, np.full(50_000, 8, np.int32), 16)
    np.testing.assert_array_equal(few.packed, many.packed)


def test_slots_beyond_16_bits_are_sorted():
    rows = np.array([40_000, 5, 65_541, -1], np.int32)
    plan = plan_segments(rows, np.arange(70_000, dtype=np.int32) * 8, np.full(70_000, 8, np.int32), 16)
    assert plan.active == (5, 40_000, 65_541)
    assert plan.order.tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize(
    ("rows", "ranks", "h_start", "block_m", "message"),
    [
        ([0, 2], [8, 8], None, 16, r"rows: slots must be in \[-1, 2\), got 0 to 2"),
        ([-2, 0], [8, 8], None, 16, r"rows: slots must be in \[-1, 2\), got -2 to 0"),
        ([0], [8, 8], None, 24, r"block_m: must be one of \(16, 32, 64, 128\), got 24"),
        ([0], [8], None, 16, r"rank: must have rank_start's shape \(2,\), got \(1,\)"),
        ([0], [8, 8], np.zeros(3, np.int32), 16, r"h_start: must have rank's shape \(2,\), got \(3,\)"),
    ],
)
def test_out_of_range_is_refused_by_name(rows, ranks, h_start, block_m, message):
    starts = np.array([0, 8], np.int32)
    with pytest.raises(ValueError, match=message):
        plan_segments(np.array(rows, np.int32), starts, np.array(ranks, np.int32), block_m, h_start)


@given(st.integers(1, 60), st.integers(1, 12), st.sampled_from(BLOCK_M_CHOICES))
def test_max_tiles_is_reached_by_the_worst_batch(num_tokens, num_groups, block_m):
    """All groups but one have one token."""
    groups = min(num_tokens, num_groups)
    sizes = [1] * (groups - 1) + [num_tokens - groups + 1]
    assert max_tiles(num_tokens, num_groups, block_m) == sum(-(-size // block_m) for size in sizes)


@given(st.integers(1, 40_000), st.integers(1, 300), st.data())
def test_max_packed_holds_every_smaller_plan(num_tokens: int, num_groups: int, data: st.DataObject):
    tokens, groups = data.draw(st.integers(1, num_tokens)), data.draw(st.integers(1, num_groups))
    block_m = block_m_for(tokens, groups, data.draw(st.sampled_from([FEW_RANKS, ANY_RANKS])))
    most = max_tiles(tokens, groups, block_m) * (8 + block_m)
    assert most <= max_packed(num_tokens, num_groups)


# Of 2,100 tokens of 131 groups tiles have 32 rows, though they are half empty, and of 2,048 if there are many ranks.
@pytest.mark.parametrize(
    ("num_tokens", "num_groups"), [(1, 1), (200, 9), (2048, 128), (2048, 257), (2100, 131), (8192, 65)]
)
def test_max_packed_is_little_more_than_the_largest_plan(num_tokens: int, num_groups: int):
    sizes = []
    for groups in range(1, num_groups + 1):
        for ranks in (FEW_RANKS, ANY_RANKS):
            block_m = block_m_for(num_tokens, groups, ranks)
            sizes.append(max_tiles(num_tokens, groups, block_m) * (8 + block_m))
    assert max(sizes) <= max_packed(num_tokens, num_groups) <= 1.1 * max(sizes)
