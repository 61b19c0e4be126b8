# SPDX-License-Identifier: Apache-2.0
"""h = x A^T for every slice of a fused linear, over tokens sorted by adapter, each adapter at its own rank.

An adapter's A of all slices is one block of rows in the pool, so a program takes BLOCK_C of those rows whatever slices
they belong to: rank 8 with three slices is 24 rows and not three padded blocks.

A row's result does not depend on the other rows or on its place among them, as long as block_m is the same: it and the
linear choose the kernel, which fixes the order of the sums over K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from multilora_kernels._triton import jit, row_stride, shared_memory, tl, use_kernel
from multilora_kernels.segments import RANK_PAGE, TILE_FIELDS, Segments, padded_rank
from multilora_kernels.tiles import load_tokens
from multilora_kernels.variants import ROW_STEPS


class Blocks(NamedTuple):
    """What a program takes at a time, in 16 bits."""

    c: int
    """Rows of A."""
    k: int
    """Columns of x and A, half as many in float32."""
    stages: int
    """One more than there are blocks of K on their way."""


# What a program would wait for is one 16-wide mma after another, each on the sum of the one before: `down` (K 14,336)
# took 20 us even for one token. So each warp sums its own part of every block of K, and the parts are added up at the
# end, always in the same order. Us at Llama-3.1-8B's linears before and since, x in L2 (H100, 2026-11-27): 256 tokens
# of 4 adapters of rank 16 qkv 8.0 / 6.4, o 7.8 / 6.1, gate_up 8.1 / 6.4, down 19.7 / 11.2; 2,048 tokens 12.0 / 11.5,
# 8.9 / 7.3, 8.8 / 9.4, 23.9 / 21.5. Fewer columns at a time take longer (256 for 1,024 a fifth, at `down` half), 8
# warps 5 to 15%; 32 rows of A read x half as often, which pays only where there are more programs than the GPU holds.
SPLIT = NUM_WARPS = 4
ONE_SLICE = {16: Blocks(16, 1024, 4), 32: Blocks(16, 512, 4), 64: Blocks(16, 256, 4), 128: Blocks(16, 128, 3)}
SLICES = {16: Blocks(16, 512, 4), 32: Blocks(32, 256, 4), 64: Blocks(16, 256, 4), 128: Blocks(16, 128, 3)}
# More rows than ROW_STEPS: more programs than fit; with one stage less a third one fits an SM, 11.5 us at qkv for 16.4.
SLICES_MANY_ROWS = {**SLICES, 16: Blocks(16, 512, 3)}


@jit
def _shrink_kernel(
    x, a, h, rows, tiles,
    slices, k_size, stride_x, stride_a, stride_h,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    TILE_FIELDS: tl.constexpr, RANK_PAGE: tl.constexpr,
):  # fmt: skip
    # Programs of one tile are neighbours in axis 0, so that all but the first find x in L2.
    tile = tiles + TILE_FIELDS * tl.program_id(1)
    rank_start, rank = tl.load(tile + 2), tl.load(tile + 3)
    h_start, h_stride = tl.load(tile + 4), tl.load(tile + 5)
    token = load_tokens(rows, BLOCK_M)
    padded = (rank + RANK_PAGE - 1) // RANK_PAGE * RANK_PAGE
    first_c = tl.program_id(0) * BLOCK_C
    if first_c < slices * padded:
        row_ok = token >= 0
        c = first_c + tl.arange(0, BLOCK_C)
        # Rows of A behind the adapter's own block may be another's NaN: they are not read.
        c_ok = c < slices * padded
        x_rows = x + token[None, :, None] * stride_x
        a_rows = a + (rank_start * slices + c)[None, None, :].to(tl.int64) * stride_a
        # Blocks are [parts of K, rows, K] and [parts of K, K, columns]: a warp has a part to itself.
        PART: tl.constexpr = BLOCK_K // SPLIT
        part = tl.arange(0, SPLIT)[:, None] * PART + tl.arange(0, PART)[None, :]
        acc = tl.zeros((SPLIT, BLOCK_M, BLOCK_C), dtype=tl.float32)
        for k in range(0, k_size, BLOCK_K):
            kk = k + part
            k_ok = kk < k_size
            x_tile = tl.load(x_rows + kk[:, None, :], mask=row_ok[None, :, None] & k_ok[:, None, :], other=0.0)
            a_tile = tl.load(a_rows + kk[:, :, None], mask=c_ok[None, None, :] & k_ok[:, :, None], other=0.0)
            acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
        column = h_start * slices + c // padded * h_stride + c % padded
        h_at = h + token[:, None] * stride_h + column[None, :]
        tl.store(h_at, tl.sum(acc, axis=0).to(h.dtype.element_ty), mask=row_ok[:, None] & c_ok[None, :])


def blocks_for(block_m: int, slices: int, num_rows: int, itemsize: int, room: int) -> Blocks:
    """Not of ranks: every value is a kernel that has to be compiled. `room`: bytes of shared memory of a program."""
    several = SLICES if num_rows <= ROW_STEPS[-1] else SLICES_MANY_ROWS
    blocks = (ONE_SLICE if slices == 1 else several)[block_m]
    k = blocks.k * 2 // itemsize
    while (blocks.stages - 1) * (block_m + blocks.c) * k * itemsize > room:
        k //= 2
    return blocks._replace(k=k)


def _launch(
    x: Tensor, a: Tensor, slices: int, rows: Tensor, tiles: Tensor, block_m: int, most: int, ranks: int
) -> Tensor:
    num_rows, k_size = x.shape
    dtype = x.dtype
    stride_x, stride_a = row_stride("grouped_shrink", "x", x, dtype), row_stride("grouped_shrink", "a", a, dtype)
    num_tiles, columns = tiles.shape[0], slices * ranks
    h = x.new_empty((num_rows, columns))
    if columns == 0 or num_tiles == 0:
        return h
    block_c, block_k, stages = blocks_for(block_m, slices, num_rows, x.itemsize, shared_memory(x.device))
    # Programs for what an adapter of the step may fill, not for all of h: one with nothing to do waits for room on an
    # SM like any other. In a border of 64 ranks 2,048 rows of rank 16 took 18 us at gate_up (H100, 2026-11-27).
    _shrink_kernel[(-(-slices * most // block_c), num_tiles)](
        x, a, h, rows, tiles,
        slices, k_size, stride_x, stride_a, columns,
        BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_K=block_k, SPLIT=SPLIT,
        TILE_FIELDS=TILE_FIELDS, RANK_PAGE=RANK_PAGE,
        num_warps=NUM_WARPS, num_stages=stages,
    )  # fmt: skip
    return h


# define/impl and not torch.library.custom_op, and neither while nothing is compiled: 8 us a call on the host for a
# custom_op, 1.6 for this one, and a layer has nine.
torch.library.define(
    "multilora::grouped_shrink",
    "(Tensor x, Tensor a, int slices, Tensor rows, Tensor tiles, int block_m, int most, int ranks) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("multilora::grouped_shrink", ("cpu", "cuda"), _launch)
OP = torch.ops.multilora.grouped_shrink.default


@torch.library.register_fake("multilora::grouped_shrink")
def _fake(
    x: Tensor, a: Tensor, slices: int, rows: Tensor, tiles: Tensor, block_m: int, most: int, ranks: int
) -> Tensor:
    return x.new_empty(x.shape[0], slices * ranks)


def grouped_shrink(x: Tensor, a: Tensor, slices: int, segments: Segments, ranks: int = 0) -> Tensor:
    """The kernel on CUDA (and under Triton's interpreter), else the reference. Deterministic.

    Args:
        x: [T, K] bf16, fp16 or fp32; rows may be strided.
        a: [R * slices, K] the rank pool of this linear, same dtype, rows may be strided. An adapter of rank r has rows
            rank_start * slices on, padded_rank(r) for each slice, where rows from r on are zero.
        slices: how many linears are fused in this one.
        segments: the step's plan, on x's device.
        ranks: columns of a slice in h if the plan was made with h_start: all offsets and ranks must fit. 0 without it.

    Returns:
        h [T, slices * (ranks or segments.plan.h_ranks)] by token, x's dtype. A token's adapter fills padded_rank(r)
        columns of each slice, where the plan says; all else, and all of the tokens without adapter, is not written.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    plan = segments.plan
    (rows, columns), (a_rows, a_columns) = x.shape, a.shape
    if columns != a_columns:
        raise ValueError(f"grouped_shrink: x has {columns} columns, a has {a_columns}")
    if rows != plan.num_tokens:
        raise ValueError(f"grouped_shrink: x has {rows} rows, the plan {plan.num_tokens} tokens")
    if a_rows % slices:
        raise ValueError(f"grouped_shrink: a has {a_rows} rows, which {slices} slices do not divide")
    if not use_kernel(x):
        return grouped_shrink_reference(x, a, slices, segments, ranks)
    launch = OP if is_compiling() else _launch
    most = plan.h_ranks
    return launch(x, a, slices, segments.rows, segments.tiles, plan.block_m, most, ranks or most)


def grouped_shrink_reference(x: Tensor, a: Tensor, slices: int, segments: Segments, ranks: int = 0) -> Tensor:
    """What grouped_shrink computes, in torch: one matmul per adapter. Any device."""
    h = x.new_empty(x.shape[0], slices * (ranks or segments.plan.h_ranks))
    for (_, _, rank_start, rank, h_start, h_stride, *_), tokens in segments.by_adapter():
        padded = padded_rank(rank)
        block = a[rank_start * slices : (rank_start + padded) * slices]
        for i, own in enumerate((x[tokens] @ block.T).split(padded, dim=1)):
            column = h_start * slices + i * h_stride
            h[tokens, column : column + padded] = own
    return h
