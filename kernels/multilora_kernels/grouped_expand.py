# SPDX-License-Identifier: Apache-2.0
"""y += h B for every slice of a fused linear, in place, over tokens sorted by adapter, each adapter at its own rank.

h comes from grouped_shrink, B is rank-major and already multiplied by the adapter's scale. Rows without adapter are
neither read nor written. No atomics: each element of y belongs to one program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multilora_kernels._triton import jit, require_launchable, require_layout, tl, triton
from multilora_kernels.segments import LARGE_BLOCK_M, MAX_BLOCK_R, Segments

# Not tuned on a GPU yet. A plain kernel with a tile per adapter took 19.6 us a layer at 256 tokens and 16 adapters of
# rank 16 on an H200 and read gate_up's B at half of the memory's bandwidth: the first thing to tune.
BLOCK_N = 128
NUM_WARPS_SMALL_M, NUM_WARPS_LARGE_M = 4, 8
NUM_STAGES = 2
# From BLOCK_M 64 the dot is a wgmma; with its left operand in registers (split sums are added there) a pipelined loop
# is miscompiled on sm_90 by ptxas before 13.3, so split h runs without pipelining.
NUM_STAGES_SPLIT = 1


@jit
def _expand_kernel(
    y, h, b, order, tiles,
    ranks, stride_y, stride_h, stride_b,
    WIDTHS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Axis 0 counts the N tiles of all slices, one slice after the other; none crosses a slice.
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

    tile = tiles + 4 * tl.program_id(1)
    first_row, end_row, rank_start, rank = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    row = first_row + tl.arange(0, BLOCK_M)
    row_ok = row < end_row
    token = tl.load(order + row, mask=row_ok, other=0).to(tl.int64)
    # Asked for first, needed last: it arrives while B and h are read.
    y_tile_at = y + token[:, None] * stride_y + n[None, :]
    y_ok = row_ok[:, None] & column_ok[None, :]
    y_tile = tl.load(y_tile_at, mask=y_ok, other=0.0)

    h_rows = h + tl.cast(slice_index, tl.int64) * stride_h + row[:, None].to(tl.int64) * ranks
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r_start in range(0, rank, BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        # h is whole blocks wide and zero beyond the rank: without a mask by rank its loads stay vectors.
        h_tile = tl.load(h_rows + r[None, :], mask=row_ok[:, None], other=0.0)
        for split in tl.static_range(1, SPLITS):
            h_rows_of_split = h_rows + split * len(WIDTHS) * stride_h
            h_tile += tl.load(h_rows_of_split + r[None, :], mask=row_ok[:, None], other=0.0)
        # Masked by rank and not multiplied by zero: the ranks beyond may be another adapter's NaN.
        b_rows = b + (rank_start + r)[:, None].to(tl.int64) * stride_b
        b_tile = tl.load(b_rows + n[None, :], mask=(r < rank)[:, None] & column_ok[None, :], other=0.0)
        acc = tl.dot(h_tile.to(b_tile.dtype), b_tile, acc, input_precision="ieee")
    tl.store(y_tile_at, (y_tile.to(tl.float32) + acc).to(y.dtype.element_ty), mask=y_ok)


def _check(y: Tensor, h: Tensor, b: Tensor, widths: list[int]) -> None:
    if sum(widths) != b.shape[1] or b.shape[1] != y.shape[1]:
        raise ValueError(
            f"grouped_expand: slice widths {widths} must add up to b's columns ({b.shape[1]}) and y's ({y.shape[1]})"
        )
    if h.shape[1] != len(widths):
        raise ValueError(f"grouped_expand: h has {h.shape[1]} slices, but {len(widths)} widths are given")


def _launch(y: Tensor, h: Tensor, b: Tensor, order: Tensor, tiles: Tensor, block_m: int, widths: list[int]) -> None:
    require_launchable("grouped_expand", y)
    require_layout("grouped_expand", b.dtype, y=y, b=b)
    _check(y, h, b, widths)
    splits, ranks = h.shape[0], h.shape[3]
    if h.numel() == 0:
        return
    large = block_m >= LARGE_BLOCK_M
    _expand_kernel[(sum(triton.cdiv(width, BLOCK_N) for width in widths), tiles.shape[0])](
        y, h, b, order, tiles,
        ranks, y.stride(0), h.stride(1), b.stride(0),
        WIDTHS=tuple(widths), SPLITS=splits,
        BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_R=min(ranks, MAX_BLOCK_R),
        num_warps=NUM_WARPS_LARGE_M if large else NUM_WARPS_SMALL_M,
        num_stages=NUM_STAGES if splits == 1 else NUM_STAGES_SPLIT,
    )  # fmt: skip


torch.library.define(
    "multilora::grouped_expand",
    "(Tensor(a!) y, Tensor h, Tensor b, Tensor order, Tensor tiles, int block_m, int[] widths) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("multilora::grouped_expand", ("cpu", "cuda"), _launch)


@torch.library.register_fake("multilora::grouped_expand")
def _fake(y: Tensor, h: Tensor, b: Tensor, order: Tensor, tiles: Tensor, block_m: int, widths: list[int]) -> None:
    return None


def grouped_expand(y: Tensor, h: Tensor, b: Tensor, slice_widths: tuple[int, ...], segments: Segments) -> None:
    """The kernel. Deterministic; y's other rows stay as they are bit for bit.

    Args:
        y: [T, N] bf16, fp16 or fp32, changed in place; rows may be strided.
        h: [splits, slices, M, ranks] from grouped_shrink under the same segments.
        b: [R, N] the rank pool of this linear, y's dtype; slice i has columns sum(widths[:i]) up to sum(widths[:i+1]).
        slice_widths: output width of each slice, adding up to N.
        segments: the step's plan, on y's device.

    Raises RuntimeError on a CPU tensor outside Triton's interpreter, ValueError for layouts it cannot read.
    """
    torch.ops.multilora.grouped_expand.default(
        y, h, b, segments.order, segments.tiles, segments.plan.block_m, slice_widths
    )


def grouped_expand_reference(
    y: Tensor, h: Tensor, b: Tensor, slice_widths: tuple[int, ...], segments: Segments
) -> None:
    """What grouped_expand computes, in torch: one matmul per adapter and slice. Any device.

    The product is rounded to y's dtype before it is added, as PEFT does; the kernel rounds once, after the sum.
    """
    _check(y, h, b, list(slice_widths))
    h_slices = (h[0] if h.shape[0] == 1 else h.sum(dim=0).to(b.dtype)).unbind(0)
    y_slices, b_slices = y.split(slice_widths, dim=1), b.split(slice_widths, dim=1)
    for first, end, rank_start, rank in segments.plan.groups.tolist():
        tokens = segments.order[first:end]
        for h_slice, y_slice, b_slice in zip(h_slices, y_slices, b_slices, strict=True):
            delta = h_slice[first:end, :rank] @ b_slice[rank_start : rank_start + rank]
            y_slice.index_add_(0, tokens, delta)
