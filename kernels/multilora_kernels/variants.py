# SPDX-License-Identifier: Apache-2.0
"""Which variant of a LoRA kernel a step takes: by the rows of its tiles, by its largest rank and by its rows.

Every variant has to be compiled before the engine is ready, so there are few.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

BLOCK_M_CHOICES = (16, 32, 64, 128)
"""tl.dot needs at least 16 rows; from 64 on Hopper uses wgmma (but for dots of three dimensions)."""
LARGE_BLOCK_M = 64
FEW_RANKS, ANY_RANKS = 16, 32
"""Values of rank_block. tl.dot needs at least 16."""
ROW_STEPS = (64, 512)
"""Behind these numbers of rows launchers may take other variants of their kernels: few rows wait for loads, many keep
the memory busy."""

# Llama-3.1-8B, us of a layer's kernels (H100, 2026-11-27). Tiles of 32 rows read B half as often, but there are half as
# many: at 2,048 tokens of 8 adapters of rank 30, of 8 to 64, and of 64 they take 198, 214 and 279 for 228, 250 and
# 363, at 1,024 tokens 126, 134 and 156 for 118, 132 and 198, at 600 tokens 104, 113 and 129 for 87, 97 and 142. Few
# ranks lose 5 at 2,048 (H200, 2026-11-24). 64 rows lose in every kernel, by up to 70%. Nothing above 2,048 tokens is
# measured.
MAX_TOKENS_BLOCK_M_16 = {FEW_RANKS: 2048, ANY_RANKS: 1024}
MAX_TOKENS_BLOCK_M_32 = 16384


class Passes(NamedTuple):
    """How a kernel goes through the ranks of an adapter."""

    first: int
    """Ranks that it takes first; tl.dot needs at least 16."""
    more: int
    """Ranks that it takes at a time behind those, 0 if there are none: without the loop for them it needs a fifth to
    two fifths fewer registers, so that more programs run at a time."""
    registers: Mapping[int, int] = MappingProxyType({})
    """Most registers of a thread, by BLOCK_M, for 16 bits. Where it says nothing ptxas decides."""

    def most_registers(self, block_m: int, itemsize: int) -> int | None:
        return self.registers.get(block_m) if itemsize == 2 else None


def rank_block_for(max_rank: int) -> int:
    """The kind of kernel for a step whose adapters have up to `max_rank` ranks."""
    return FEW_RANKS if max_rank <= FEW_RANKS else ANY_RANKS


def row_step(num_rows: int) -> int:
    """Which of a launcher's variants so many rows take, 0 to len(ROW_STEPS)."""
    return bisect_left(ROW_STEPS, num_rows)


def rank_passes(rank_block: int, num_rows: int, passes: Sequence[Passes]) -> Passes:
    """Those that a launcher takes: of `passes` the first for FEW_RANKS, the others for ANY_RANKS by row step."""
    return passes[0 if rank_block == FEW_RANKS else 1 + row_step(num_rows)]


def block_m_for(num_tokens: int, num_groups: int, rank_block: int) -> int:
    """Rows of a tile: small while tiles are what keeps the GPU busy, and never twice what a group has on average."""
    small = num_tokens <= MAX_TOKENS_BLOCK_M_16[rank_block]
    block_m = 16 if small else 32 if num_tokens <= MAX_TOKENS_BLOCK_M_32 else 64
    while block_m > 16 and block_m * num_groups > 2 * num_tokens:
        block_m //= 2
    return block_m
