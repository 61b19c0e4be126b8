# SPDX-License-Identifier: Apache-2.0
"""Which variant of a LoRA kernel a step takes: by the rows of its tiles, by its largest rank and by its rows.

Every variant has to be compiled before the engine is ready, so there are few.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

BLOCK_M_CHOICES = (16, 32, 64, 128)
"""tl.dot needs at least 16 rows; from 64 on Hopper uses wgmma."""
LARGE_BLOCK_M = 64
FEW_RANKS, ANY_RANKS = 16, 32
"""Values of rank_block. tl.dot needs at least 16."""
ROW_STEPS = (64, 512)
"""Behind these numbers of rows launchers may take other variants of their kernels: few rows wait for loads, many keep
the memory busy."""

# Llama-3.1-8B, rank 16, H200, cold L2, 2026-11-24. 16 rows for 32 at 2048 tokens of 4 adapters: grouped_shrink gains
# 1.3 to 3.5 us at each of four linears, grouped_expand loses up to 0.4, rope_write 1.4, gated_activation 2.3, so 16 is
# 5 us better in a layer. 64 rows lose to 32 in every kernel, there by 5 to 30%.
# Nothing above 2048 tokens is measured.
MAX_TOKENS_BLOCK_M_16 = 2048
MAX_TOKENS_BLOCK_M_32 = 16384


def rank_block_for(max_rank: int) -> int:
    """The kind of kernel for a step whose adapters have up to `max_rank` ranks."""
    return FEW_RANKS if max_rank <= FEW_RANKS else ANY_RANKS


def row_step(num_rows: int) -> int:
    """Which of a launcher's variants so many rows take, 0 to len(ROW_STEPS)."""
    return bisect_left(ROW_STEPS, num_rows)


def rank_passes(rank_block: int, num_rows: int, passes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(ranks that a kernel takes first, and at a time behind those), one for ANY_RANKS as `passes` says by row step.

    One for FEW_RANKS takes no more: 0. Without the loop for them it needs a fifth to two fifths fewer registers, so
    that more programs run at a time: at 2,048 rows gated_activation takes 54 us for 61 (H200, 2026-11-27).
    """
    return (rank_block, 0) if rank_block == FEW_RANKS else passes[row_step(num_rows)]


def block_m_for(num_tokens: int, num_groups: int) -> int:
    """Rows of a tile: small while tiles are what keeps the GPU busy, and never twice what a group has on average."""
    block_m = 16 if num_tokens <= MAX_TOKENS_BLOCK_M_16 else 32 if num_tokens <= MAX_TOKENS_BLOCK_M_32 else 64
    while block_m > 16 and block_m * num_groups > 2 * num_tokens:
        block_m //= 2
    return block_m
