# SPDX-License-Identifier: Apache-2.0
"""h = x A^T for every slice of a fused linear, over tokens sorted by adapter, each adapter at its own rank.

h is `[splits, slices, M, ranks]`: the sum over `splits` is x A^T, row m belongs to token `order[m]`, and the columns
from an adapter's rank on are zero. `ranks` is the step's largest rank, rounded up to whole blocks. With one split h
has x's dtype, so that the expand's dot reads it from memory as it is; partial sums (several splits) stay float32.

A row's result does not depend on the other rows or on its place among them as long as `block_m`, `splits` and the
rank block (16, 32 or 64, from the step's largest rank) are the same: each fixes the order of the sums over K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multilora_kernels._triton import jit, require_launchable, require_layout, tl, triton
from multilora_kernels.segments import LARGE_BLOCK_M, Segments, rank_blocks

# Not tuned on a GPU yet. BLOCK_K 128 is what fits three stages of x and A at BLOCK_M 64 in 96 KiB; for decode the
# wider block keeps more bytes in flight from the few programs there are.
BLOCK_K_SMALL_M, BLOCK_K_LARGE_M = 256, 128
NUM_WARPS, NUM_STAGES = 4, 3
# Assumed, not measured: one program alone streams A at 80 GB/s on an H200. K is split while programs are fewer.
TARGET_PROGRAMS = 128
MIN_K_PER_SPLIT = 1024


@jit
def _shrink_kernel(
    x, a, h, order, tiles,
    k_size, k_per_split, ranks, stride_x, stride_a_slice, stride_a, stride_h,
    SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs of one tile are neighbours in axis 0, so that all but the first find x in L2.
    tile = tiles + 4 * tl.program_id(1)
    first_row, end_row, rank_start, rank = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    rank_block = tl.program_id(0) % (ranks // BLOCK_R)
    plane = tl.program_id(0) // (ranks // BLOCK_R)
    slice_index, split = plane % SLICES, plane // SLICES

    row = first_row + tl.arange(0, BLOCK_M)
    row_ok = row < end_row
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if rank_block * BLOCK_R < rank:
        token = tl.load(order + row, mask=row_ok, other=0).to(tl.int64)
        x_rows = x + token[:, None] * stride_x
        a_rows = a + slice_index.to(tl.int64) * stride_a_slice + (rank_start + r)[None, :].to(tl.int64) * stride_a
        k_start = split * k_per_split
        for k in range(k_start, tl.minimum(k_start + k_per_split, k_size), BLOCK_K):
            kk = k + tl.arange(0, BLOCK_K)
            x_tile = tl.load(x_rows + kk[None, :], mask=row_ok[:, None] & (kk < k_size)[None, :], other=0.0)
            # Masked by rank and not multiplied by zero: the ranks beyond may be another adapter's NaN.
            a_tile = tl.load(a_rows + kk[:, None], mask=(r < rank)[None, :] & (kk < k_size)[:, None], other=0.0)
            acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
    h_rows = h + plane.to(tl.int64) * stride_h + row[:, None].to(tl.int64) * ranks
    tl.store(h_rows + r[None, :], acc.to(h.dtype.element_ty), mask=row_ok[:, None])


def splits_for(segments: Segments, slices: int, in_features: int) -> int:
    """How many parts to cut K into, a power of two up to 8: more while tiles alone would leave the GPU idle.

    It depends on the batch, so a row's rounding may too; pass a fixed `splits` where that matters.
    """
    block, ranks = rank_blocks(max(segments.plan.max_rank, 1))
    programs = segments.plan.num_tiles * slices * (ranks // block)
    splits = 1
    while splits < 8 and 2 * splits * programs <= TARGET_PROGRAMS and 2 * splits * MIN_K_PER_SPLIT <= in_features:
        splits *= 2
    return splits


def _shape(a: Tensor, order: Tensor, max_rank: int, splits: int) -> tuple[int, int, int, int]:
    return splits, a.shape[0], order.shape[0], rank_blocks(max_rank)[1]


def _launch(x: Tensor, a: Tensor, order: Tensor, tiles: Tensor, block_m: int, max_rank: int, splits: int) -> Tensor:
    require_launchable("grouped_shrink", x)
    require_layout("grouped_shrink", x.dtype, x=x, a=a)
    if x.shape[1] != a.shape[2]:
        raise ValueError(f"grouped_shrink: x has {x.shape[1]} columns, a has {a.shape[2]}")
    block_r, ranks = rank_blocks(max_rank)
    h = x.new_empty(_shape(a, order, max_rank, splits), dtype=x.dtype if splits == 1 else torch.float32)
    if h.numel() == 0:
        return h
    # In bytes the blocks are those of the two-byte dtypes.
    block_k = (BLOCK_K_LARGE_M if block_m >= LARGE_BLOCK_M else BLOCK_K_SMALL_M) * 2 // x.element_size()
    k_per_split = triton.cdiv(triton.cdiv(x.shape[1], block_k), splits) * block_k
    _shrink_kernel[(splits * a.shape[0] * (ranks // block_r), tiles.shape[0])](
        x, a, h, order, tiles,
        x.shape[1], k_per_split, ranks, x.stride(0), a.stride(0), a.stride(1), h.stride(1),
        SLICES=a.shape[0], BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_K=block_k,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return h


# define/impl and not torch.library.custom_op: 1.6 us a call on the host against 8 us, four times per layer and step.
torch.library.define(
    "multilora::grouped_shrink",
    "(Tensor x, Tensor a, Tensor order, Tensor tiles, int block_m, int max_rank, int splits) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("multilora::grouped_shrink", ("cpu", "cuda"), _launch)


@torch.library.register_fake("multilora::grouped_shrink")
def _fake(x: Tensor, a: Tensor, order: Tensor, tiles: Tensor, block_m: int, max_rank: int, splits: int) -> Tensor:
    return x.new_empty(_shape(a, order, max_rank, splits), dtype=x.dtype if splits == 1 else torch.float32)


def grouped_shrink(x: Tensor, a: Tensor, segments: Segments, splits: int = 1) -> Tensor:
    """The kernel. Deterministic: partial sums are added in a fixed order by grouped_expand.

    Args:
        x: [T, K] bf16, fp16 or fp32, rows may be strided.
        a: [slices, R, K] the rank pool of this linear, same dtype, rows may be strided.
        segments: the step's plan, on x's device.
        splits: parts of K that are summed separately, see splits_for.

    Returns: h as the module describes it, [splits, slices, M, ranks].
    Raises RuntimeError on a CPU tensor outside Triton's interpreter, ValueError for layouts it cannot read.
    """
    plan = segments.plan
    return torch.ops.multilora.grouped_shrink.default(
        x, a, segments.order, segments.tiles, plan.block_m, plan.max_rank, splits
    )


def grouped_shrink_reference(x: Tensor, a: Tensor, segments: Segments) -> Tensor:
    """What grouped_shrink computes, in torch, with one split: one batched matmul per adapter. Any device."""
    plan = segments.plan
    h = x.new_zeros(_shape(a, segments.order, plan.max_rank, splits=1))
    x_sorted = x.index_select(0, segments.order)
    for first, end, rank_start, rank in plan.groups.tolist():
        weights = a[:, rank_start : rank_start + rank]
        h[0, :, first:end, :rank] = x_sorted[first:end] @ weights.transpose(1, 2)
    return h
