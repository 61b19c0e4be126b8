# SPDX-License-Identifier: Apache-2.0
"""y += h B for every slice of a fused linear, in place, over tokens sorted by adapter, each adapter at its own rank.

B is rank-major and already multiplied by the adapter's scale. Rows without adapter are neither read nor written. No
atomics: each element of y belongs to one program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from multilora_kernels._triton import jit, row_stride, tl, use_kernel
from multilora_kernels.delta import Delta
from multilora_kernels.segments import RANK_PAGE, TILE_FIELDS
from multilora_kernels.tiles import load_tokens
from multilora_kernels.variants import FEW_RANKS, Passes, rank_passes

# Llama-3.1-8B, rank 16, H200, cold L2, 2026-11-24: o takes 4.2 us at 256 tokens of 16 adapters and 13.9 at 2,048 of 4,
# where it moves as many bytes a second as a copy. BLOCK_N 64 and 256 and 2 and 8 warps are no better in any shape
# beyond noise and up to 12% worse in some; 512 loses 4 to 16%.
BLOCK_N = 128
NUM_WARPS = {16: 4, 32: 4, 64: 8, 128: 8}
# From BLOCK_M 64 the dot is a wgmma whose left operand is in registers (h is masked after the load); pipelined, such a
# loop is miscompiled for sm_90 by ptxas before 13.3. One or two rank blocks leave nothing to pipeline anyway.
NUM_STAGES = 1
# 16 adapters of rank 30, 16 of 8 to 64, one of 64 (H200, 2026-11-27): 256 rows of o take 5.2, 4.9 and 4.1 us, with (32,
# 32) and 80 registers 4.7, 5.1 and 4.4; 512 rows 5.9, 6.1 and 5.8, without a limit 6.0, 6.1 and 6.0, with (64, 64) 6.9,
# 6.5 and 5.9. 2,048 rows of 8 adapters, in tiles of 32 rows, 13.1, 14.3 and 17.5, with (32, 32) 13.4, 14.1 and 17.7.
PASSES = (Passes(FEW_RANKS, 0), Passes(64, 16, {16: 64}), Passes(64, 16, {16: 64}), Passes(32, 16, {16: 64, 32: 96}))


@jit
def load_h(h_rows, r, rank, row_ok, RANK_PAGE: tl.constexpr):
    """h [rows, ranks r], zero from `rank` on; h_rows are pointers [rows, 1] to rank 0."""
    # Loaded by whole pages, so that loads are vectors, then selected: the ranks beyond may be another adapter's NaN.
    padded = tl.multiple_of((rank + RANK_PAGE - 1) // RANK_PAGE * RANK_PAGE, RANK_PAGE)
    h = tl.load(h_rows + r[None, :], mask=row_ok[:, None] & (r < padded)[None, :], other=0.0)
    return tl.where((r < rank)[None, :], h, 0.0)


@jit
def load_b(b_columns, r, rank, stride_b, column_ok):
    """B [ranks r, columns], zero from `rank` on; b_columns are pointers [1, columns] to the adapter's rank 0."""
    return tl.load(b_columns + r[:, None] * stride_b, mask=(r < rank)[:, None] & column_ok[None, :], other=0.0)


@jit
def _expand_kernel(
    y, h, b, rows, tiles,
    stride_y, stride_h, stride_b,
    WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    MORE_R: tl.constexpr, TILE_FIELDS: tl.constexpr, RANK_PAGE: tl.constexpr,
):  # fmt: skip
    tile = tiles + TILE_FIELDS * tl.program_id(1)
    rank_start, rank = tl.load(tile + 2), tl.load(tile + 3)
    # Both are whole pages: the hint makes the loads of h vectors.
    h_start = tl.multiple_of(tl.load(tile + 4), RANK_PAGE)
    h_stride = tl.multiple_of(tl.load(tile + 5), RANK_PAGE)
    token = load_tokens(rows, BLOCK_M)
    if rank > 0:
        # Axis 0 counts the N blocks of all slices, one slice after the other; none crosses a slice.
        block = tl.program_id(0)
        slice_index, first_block, column, width = 0, 0, 0, WIDTHS[0]
        blocks_before, columns_before = 0, 0
        for i in tl.static_range(len(WIDTHS)):
            reached = block >= blocks_before
            slice_index = tl.where(reached, i, slice_index)
            first_block = tl.where(reached, blocks_before, first_block)
            column = tl.where(reached, columns_before, column)
            width = tl.where(reached, WIDTHS[i], width)
            blocks_before += (WIDTHS[i] + BLOCK_N - 1) // BLOCK_N
            columns_before += WIDTHS[i]
        in_slice = (block - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_ok = in_slice < width
        n = column + in_slice

        row_ok = token >= 0
        r = tl.arange(0, BLOCK_R)
        b_columns = b + rank_start.to(tl.int64) * stride_b + n[None, :]
        b_tile = load_b(b_columns, r, rank, stride_b, column_ok)
        y_at = y + token[:, None] * stride_y + n[None, :]
        y_ok = row_ok[:, None] & column_ok[None, :]
        y_tile = tl.load(y_at, mask=y_ok, other=0.0)
        h_rows = h + token[:, None] * stride_h + (h_start * len(WIDTHS) + slice_index * h_stride)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = tl.dot(load_h(h_rows, r, rank, row_ok, RANK_PAGE), b_tile, acc, input_precision="ieee")
        if MORE_R > 0:
            for first_r in range(BLOCK_R, rank, MORE_R):
                more = first_r + tl.arange(0, MORE_R)
                h_more = load_h(h_rows, more, rank, row_ok, RANK_PAGE)
                b_more = load_b(b_columns, more, rank, stride_b, column_ok)
                acc = tl.dot(h_more, b_more, acc, input_precision="ieee")
        tl.store(y_at, (y_tile.to(tl.float32) + acc).to(y.dtype.element_ty), mask=y_ok)


def _launch(
    y: Tensor, h: Tensor, b: Tensor, rows: Tensor, tiles: Tensor, block_m: int, rank_block: int, widths: Sequence[int]
) -> None:
    dtype = y.dtype
    stride_y = row_stride("grouped_expand", "y", y, dtype)
    stride_h, stride_b = row_stride("grouped_expand", "h", h, dtype), row_stride("grouped_expand", "b", b, dtype)
    num_tiles = tiles.shape[0]
    if num_tiles == 0:
        return
    passes = rank_passes(rank_block, y.shape[0], PASSES)
    blocks = 0
    for width in widths:
        blocks -= -width // BLOCK_N
    _expand_kernel[(blocks, num_tiles)](
        y, h, b, rows, tiles,
        stride_y, stride_h, stride_b,
        WIDTHS=tuple(widths), BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_R=passes.first,
        MORE_R=passes.more, TILE_FIELDS=TILE_FIELDS, RANK_PAGE=RANK_PAGE,
        num_warps=NUM_WARPS[block_m], num_stages=NUM_STAGES, maxnreg=passes.most_registers(block_m, y.itemsize),
    )  # fmt: skip


torch.library.define(
    "multilora::grouped_expand",
    "(Tensor(a!) y, Tensor h, Tensor b, Tensor rows, Tensor tiles, int block_m, int rank_block, int[] widths) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("multilora::grouped_expand", ("cpu", "cuda"), _launch)
OP = torch.ops.multilora.grouped_expand.default


@torch.library.register_fake("multilora::grouped_expand")
def _fake(
    y: Tensor, h: Tensor, b: Tensor, rows: Tensor, tiles: Tensor, block_m: int, rank_block: int, widths: list[int]
) -> None:
    return None


def grouped_expand(y: Tensor, delta: Delta, widths: Sequence[int]) -> None:
    """The kernel on CUDA (and under Triton's interpreter), else the reference.

    The sum is rounded to y's dtype once. Deterministic; y's other rows stay as they are bit for bit.

    Args:
        y: [T, N] bf16, fp16 or fp32, changed in place; rows may be strided, and h may lie behind y in the same rows.
        delta: h, b and segments of this linear, in y's dtype.
        widths: output width of each slice, adding up to N.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    rows, columns = y.shape
    if sum(widths) != columns:
        raise ValueError(f"grouped_expand: widths {tuple(widths)} must add up to y's {columns} columns")
    delta.require("grouped_expand", "y", rows, columns)
    if not use_kernel(y):
        return grouped_expand_reference(y, delta, widths)
    launch = OP if is_compiling() else _launch
    segments = delta.segments
    plan = segments.plan
    launch(y, delta.h, delta.b, segments.rows, segments.tiles, plan.block_m, plan.rank_block, widths)


def grouped_expand_reference(y: Tensor, delta: Delta, widths: Sequence[int]) -> None:
    """What grouped_expand computes, in torch: one matmul per adapter and slice. Any device."""
    slices = len(widths)
    for (_, _, rank_start, rank, h_start, h_stride, *_), tokens in delta.segments.by_adapter():
        y_rows, h_rows = y[tokens].float(), delta.h[tokens].float()
        b_rows = delta.b[rank_start : rank_start + rank].float()
        for i, (y_slice, b_slice) in enumerate(
            zip(y_rows.split(list(widths), dim=1), b_rows.split(list(widths), dim=1), strict=True)
        ):
            column = h_start * slices + i * h_stride
            y_slice.addmm_(h_rows[:, column : column + rank], b_slice)
        y[tokens] = y_rows.to(y.dtype)
