# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from multilora_kernels import ANY_RANKS, FEW_RANKS, ROW_STEPS, activation, block_m_for, rank_block_for, rope, row_step
from multilora_kernels.grouped_expand import PASSES
from multilora_kernels.variants import BLOCK_M_CHOICES, rank_passes

ALL_PASSES = pytest.mark.parametrize(
    "passes", [PASSES, activation.PASSES, rope.PASSES], ids=["expand", "activation", "rope"]
)


def test_block_m_grows_with_tokens_but_not_beyond_what_groups_fill():
    assert block_m_for(256, 64, FEW_RANKS) == block_m_for(256, 64, ANY_RANKS) == 16
    assert [block_m_for(tokens, 4, FEW_RANKS) for tokens in (512, 2048, 8192, 32768)] == [16, 16, 32, 64]
    assert [block_m_for(tokens, 4, ANY_RANKS) for tokens in (1024, 2048, 8192, 32768)] == [16, 32, 32, 64]
    for ranks in (FEW_RANKS, ANY_RANKS):
        assert block_m_for(8192, 1024, ranks) == 16
        assert block_m_for(0, 0, ranks) in BLOCK_M_CHOICES


@ALL_PASSES
def test_kernels_for_few_ranks_hold_them_at_once_and_take_no_more(passes):
    assert [rank_block_for(rank) for rank in (0, 1, 16, 17, 4096)] == [FEW_RANKS] * 3 + [ANY_RANKS] * 2
    for rows in (1, 5000):
        assert rank_passes(FEW_RANKS, rows, passes)[:2] == (16, 0)


@ALL_PASSES
def test_every_row_step_has_a_variant_for_any_ranks(passes):
    assert len(passes) == len(ROW_STEPS) + 2
    for rows, wanted in ((1, 0), (64, 0), (65, 1), (512, 1), (513, 2), (10**6, 2)):
        assert row_step(rows) == wanted
        chosen = rank_passes(ANY_RANKS, rows, passes)
        assert chosen == passes[1 + wanted]
        assert min(chosen.first, chosen.more) >= 16, "what tl.dot needs; and some adapter has more"


@ALL_PASSES
def test_registers_are_limited_only_where_that_was_measured(passes):
    for some in passes:
        assert some.registers.keys() <= {16, 32}
        assert [some.most_registers(block_m, 4) for block_m in BLOCK_M_CHOICES] == [None] * 4, "float32 needs more"
        assert [some.most_registers(block_m, 2) for block_m in (64, 128)] == [None] * 2
    few, *_, prompts = activation.PASSES
    assert [few.most_registers(block_m, 2) for block_m in (16, 32)] == [56, None]
    assert [prompts.most_registers(block_m, 2) for block_m in (16, 32)] == [72, 128]
