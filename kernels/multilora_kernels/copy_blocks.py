# SPDX-License-Identifier: Apache-2.0
"""Copies adapters' A from the rank pools into the borders of the base weights, at every site of a model in one launch.

An adapter's A is one contiguous block of rows at each site, in the pool as in the border, so that a copy is a range of
bytes. The sites are too many for kernel arguments: their addresses lie in a table on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora_kernels._triton import jit, tl, use_kernel

# An adapter of rank 16 has 128 to 450 KiB a site in an 8B model: 27.8 us for one at all sites, 338 for 16, as fast as
# any copy. BLOCK_WORDS 1024 to 8192, 4 to 32 chunks and 4 warps are within 3% (H200, 2026-11-24).
BLOCK_WORDS = 4096
NUM_WARPS = 8
CHUNKS = 8
"""Programs that share a block; 128 sites of an 8B model then make 1,024 programs for one adapter."""

SITE_FIELDS, MOVE_FIELDS = 4, 3
WORD_BYTES, ALIGNMENT = 4, 16


@dataclass(frozen=True, eq=False)
class CopyTable:
    """The pools and borders of all sites and their addresses. It keeps the tensors, hence the addresses, alive."""

    pools: tuple[Tensor, ...]
    borders: tuple[Tensor, ...]
    slices: tuple[int, ...]
    addresses: Tensor
    """[sites, 4] int64 on the device: address of the pool, of the border, bytes of a row, slices."""

    @staticmethod
    def of(pools: Sequence[Tensor], borders: Sequence[Tensor], slices: Sequence[int]) -> CopyTable:
        """Of each site: pool [R * slices, K], border [C * slices, K] of the same dtype, both contiguous, and slices.

        Raises:
            ValueError: a pool and its border differ, rows are no whole number of 16 bytes, or memory is not dense.
        """
        records = []
        for site, (pool, border, count) in enumerate(zip(pools, borders, slices, strict=True)):
            if pool.dtype != border.dtype or pool.shape[1] != border.shape[1]:
                raise ValueError(
                    f"copy_blocks: site {site} has a pool of {pool.dtype} with {pool.shape[1]} columns, "
                    f"but a border of {border.dtype} with {border.shape[1]}"
                )
            if not (pool.is_contiguous() and border.is_contiguous()):
                raise ValueError(f"copy_blocks: site {site} needs a contiguous pool and border")
            row_bytes = pool.shape[1] * pool.element_size()
            if any(value % ALIGNMENT for value in (row_bytes, pool.data_ptr(), border.data_ptr())):
                raise ValueError(f"copy_blocks: site {site} has rows of {row_bytes} bytes, not aligned to {ALIGNMENT}")
            records.append((pool.data_ptr(), border.data_ptr(), row_bytes, count))
        addresses = torch.tensor(records, dtype=torch.int64).view(-1, SITE_FIELDS).to(pools[0].device)
        return CopyTable(tuple(pools), tuple(borders), tuple(slices), addresses)


@jit
def _copy_kernel(
    addresses, moves,
    SITE_FIELDS: tl.constexpr, MOVE_FIELDS: tl.constexpr, WORD_BYTES: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    site = addresses + SITE_FIELDS * tl.program_id(1)
    move = moves + MOVE_FIELDS * tl.program_id(2)
    rank_bytes = tl.load(site + 2) * tl.load(site + 3)
    source = tl.load(site) + tl.load(move).to(tl.int64) * rank_bytes
    target = tl.load(site + 1) + tl.load(move + 1).to(tl.int64) * rank_bytes
    words = (tl.load(move + 2).to(tl.int64) * rank_bytes) // WORD_BYTES
    # What the compiler cannot know of addresses from memory; with it loads and stores are 16 bytes wide.
    source = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), ALIGNMENT)
    target = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), ALIGNMENT)
    words = tl.multiple_of(words, ALIGNMENT // WORD_BYTES)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK_WORDS, words, tl.num_programs(0) * BLOCK_WORDS):
        word = first + tl.arange(0, BLOCK_WORDS)
        tl.store(target + word, tl.load(source + word, mask=word < words), mask=word < words)


def copy_blocks(table: CopyTable, moves: Tensor) -> None:
    """The kernel on CUDA (and under Triton's interpreter), else the reference.

    No custom operator: what it writes is reached by address, which no operator schema can say. It belongs between
    steps, never in a compiled graph.

    Args:
        table: the sites.
        moves: [n, 3] int32 on the table's device: first rank in the pools, first rank in the borders, padded rank.
            Targets must not overlap one another. Nothing is checked against the pools' sizes: that would be a sync.
    """
    if moves.shape[0] == 0 or not table.pools:
        return
    if not use_kernel(moves):
        return copy_blocks_reference(table, moves)
    _copy_kernel[(CHUNKS, len(table.pools), moves.shape[0])](
        table.addresses, moves,
        SITE_FIELDS=SITE_FIELDS, MOVE_FIELDS=MOVE_FIELDS, WORD_BYTES=WORD_BYTES, ALIGNMENT=ALIGNMENT,
        BLOCK_WORDS=BLOCK_WORDS,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def copy_blocks_reference(table: CopyTable, moves: Tensor) -> None:
    """What copy_blocks does, in torch. Any device."""
    for source, target, ranks in moves.tolist():
        for pool, border, slices in zip(table.pools, table.borders, table.slices, strict=True):
            block = pool[source * slices : (source + ranks) * slices]
            border[target * slices : (target + ranks) * slices] = block
