# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_kernels import block_m_for, plan_segments
from multilora_kernels.segments import BLOCK_M_CHOICES, rank_blocks


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ranks = draw(st.lists(st.integers(0, 70), max_size=6))
    pages = [-(-rank // 8) * 8 for rank in ranks]
    rows = draw(st.lists(st.integers(-1, len(ranks) - 1), max_size=200))
    starts = np.cumsum([0, *pages])[: len(ranks)]
    return np.array(rows, np.int32), starts.astype(np.int32), np.array(ranks, np.int32)


@given(batches(), st.sampled_from(BLOCK_M_CHOICES))
def test_plan_describes_every_token_with_an_adapter_once(batch, block_m):
    rows, rank_start, rank = batch
    plan = plan_segments(rows, rank_start, rank, block_m)

    expected = [t for t, slot in enumerate(rows) if slot >= 0 and rank[slot] > 0]
    assert sorted(plan.order) == expected
    assert plan.num_tokens == len(expected)
    assert list(plan.order) == sorted(expected, key=lambda t: rows[t]), "sorted by adapter, stably"

    present = sorted({int(rows[t]) for t in expected})
    assert plan.num_groups == len(present)
    boundary = 0
    for (first, end, start, own_rank), slot in zip(plan.groups.tolist(), present, strict=True):
        assert first == boundary
        assert set(rows[plan.order[first:end]]) == {slot}
        assert (start, own_rank) == (rank_start[slot], rank[slot])
        boundary = end
    assert boundary == plan.num_tokens
    assert plan.max_rank == max((rank[slot] for slot in present), default=0)


@given(batches(), st.sampled_from(BLOCK_M_CHOICES))
def test_tiles_cover_each_group_without_overlap(batch, block_m):
    plan = plan_segments(*batch, block_m)
    tiles = plan.tiles.tolist()
    for first, end, rank_start, rank in plan.groups.tolist():
        own = [tile for tile in tiles if first <= tile[0] < end]
        assert [row for tile in own for row in range(tile[0], tile[1])] == list(range(first, end))
        assert all(tile[1] - tile[0] <= block_m and tile[2:] == [rank_start, rank] for tile in own)
        assert len(own) == -(-(end - first) // block_m), "no more tiles than needed"
    assert len(tiles) == plan.num_tiles


@given(batches())
def test_views_on_a_device_are_the_packed_buffer(batch):
    plan = plan_segments(*batch, 16)
    assert plan.packed.dtype == np.int32
    assert plan.packed.size == 4 * plan.num_tiles + 4 * plan.num_groups + plan.num_tokens
    segments = plan.to("cpu")
    for name in ("tiles", "groups", "order"):
        np.testing.assert_array_equal(getattr(segments, name).numpy(), getattr(plan, name))


def test_cost_does_not_grow_with_adapters_that_are_not_in_the_step():
    rows = np.array([3, 3], np.int32)
    few = plan_segments(rows, np.arange(4, dtype=np.int32) * 8, np.full(4, 8, np.int32), 16)
    many = plan_segments(rows, np.arange(5000, dtype=np.int32) * 8, np.full(5000, 8, np.int32), 16)
    np.testing.assert_array_equal(few.packed, many.packed)


@pytest.mark.parametrize(
    ("rows", "ranks", "block_m", "message"),
    [
        ([0, 2], [8, 8], 16, r"rows: slots must be in \[-1, 2\), got 0 to 2"),
        ([-2, 0], [8, 8], 16, r"rows: slots must be in \[-1, 2\), got -2 to 0"),
        ([0], [8, 8], 24, r"block_m: must be one of \(16, 32, 64, 128\), got 24"),
        ([0], [8], 16, r"rank: must have rank_start's shape \(2,\), got \(1,\)"),
    ],
)
def test_out_of_range_is_refused_by_name(rows, ranks, block_m, message):
    starts = np.array([0, 8], np.int32)
    with pytest.raises(ValueError, match=message):
        plan_segments(np.array(rows, np.int32), starts, np.array(ranks, np.int32), block_m)


def test_block_m_is_small_for_decode_and_large_for_prefill():
    assert block_m_for(num_tokens=256, num_adapters=64) == 16
    assert block_m_for(num_tokens=2048, num_adapters=4) == 64
    assert block_m_for(num_tokens=0, num_adapters=0) in BLOCK_M_CHOICES


@given(st.integers(0, 600))
def test_rank_blocks_hold_the_largest_rank(max_rank):
    block, total = rank_blocks(max_rank)
    assert block in (16, 32, 64)
    assert total % block == 0
    assert max_rank <= total < max_rank + block
