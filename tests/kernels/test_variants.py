# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from multilora_kernels import ANY_RANKS, FEW_RANKS, ROW_STEPS, activation, block_m_for, rank_block_for, rope, row_step
from multilora_kernels.grouped_expand import PASSES
from multilora_kernels.variants import BLOCK_M_CHOICES, rank_passes


def test_block_m_grows_with_tokens_but_not_beyond_what_groups_fill():
    assert block_m_for(num_tokens=256, num_groups=64) == 16
    assert block_m_for(num_tokens=2048, num_groups=4) == 16
    assert block_m_for(num_tokens=8192, num_groups=4) == 32
    assert block_m_for(num_tokens=32768, num_groups=4) == 64
    assert block_m_for(num_tokens=8192, num_groups=1024) == 16
    assert block_m_for(num_tokens=0, num_groups=0) in BLOCK_M_CHOICES


def test_kernels_for_few_ranks_hold_them_at_once_and_take_no_more():
    assert [rank_block_for(rank) for rank in (0, 1, 16, 17, 4096)] == [FEW_RANKS] * 3 + [ANY_RANKS] * 2
    for rows in (1, 5000):
        assert rank_passes(FEW_RANKS, rows, ()) == (16, 0)


@pytest.mark.parametrize("passes", [PASSES, activation.PASSES, rope.PASSES], ids=["expand", "activation", "rope"])
def test_every_row_step_has_a_variant_for_any_ranks(passes):
    assert len(passes) == len(ROW_STEPS) + 1
    for rows, wanted in ((1, 0), (64, 0), (65, 1), (512, 1), (513, 2), (10**6, 2)):
        assert row_step(rows) == wanted
        first, more = rank_passes(ANY_RANKS, rows, passes)
        assert (first, more) == passes[wanted]
        assert min(first, more) >= 16, "what tl.dot needs; and some adapter has more"
