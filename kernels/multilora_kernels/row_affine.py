# SPDX-License-Identifier: Apache-2.0
"""y = gain * y + shift by row, in place, with the two vectors of each row's own adapter: DoRA and trained biases.

Rows without adapter, and rows whose adapter has no vectors here, are neither read nor written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling

from multilora_kernels._triton import jit, row_stride, tl, use_kernel
from multilora_kernels.segments import TILE_FIELDS, TILE_SLOT, Segments
from multilora_kernels.tiles import load_tokens

# A program of 4 warps has 4,096 values: with 16-bit y two 16-byte loads of it in flight a thread, and the vectors are
# read once for all rows of a tile. 256 rows of 16 adapters take 3.3 us at 4,096 columns and 11.2 at 28,672, 2,048 of 4
# 11.8 and 62.5 (H200, 2026-11-27). 2,048 to 16,384 values and 2 to 8 warps are within noise but for a few of 8 warps,
# 1,024 are up to 80% worse.
VALUES_PER_PROGRAM, NUM_WARPS = 4096, 4
UNIT = 4
"""Vectors begin at multiples of this many float32, 16 bytes."""


@dataclass(frozen=True, eq=False)
class Affine:
    """The vectors of all adapters at one linear, and which row is whose."""

    values: Tensor
    """[elements] float32: an adapter's gain [N] and, right behind it, its shift [N]."""
    offsets: Tensor
    """int32 [slots]: where the gain of each slot's adapter begins in values, in units of 4 elements; below 0: it has
    none here. Read for the slots of the step's rows only."""
    segments: Segments
    """The step's tokens by adapter, on y's device."""


@jit
def _affine_kernel(
    y, values, offsets, rows, tiles,
    width, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_FIELDS: tl.constexpr, TILE_SLOT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    tile = tiles + TILE_FIELDS * tl.program_id(1)
    rank, slot = tl.load(tile + 3), tl.load(tile + TILE_SLOT)
    token = load_tokens(rows, BLOCK_M)
    # Rank 0: rows without adapter, or an empty tile.
    if rank > 0:
        start = tl.load(offsets + slot)
        if start >= 0:
            n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
            n_ok = n < width
            gain_at = values + start.to(tl.int64) * UNIT + n
            gain = tl.load(gain_at, mask=n_ok, other=0.0)
            shift = tl.load(gain_at + width, mask=n_ok, other=0.0)
            row_ok = token >= 0
            ok = row_ok[:, None] & n_ok[None, :]
            y_at = y + token[:, None] * stride_y + n[None, :]
            y_tile = tl.load(y_at, mask=ok, other=0.0).to(tl.float32)
            tl.store(y_at, (y_tile * gain[None, :] + shift[None, :]).to(y.dtype.element_ty), mask=ok)


def block_n_for(block_m: int) -> int:
    return VALUES_PER_PROGRAM // block_m


def _launch(y: Tensor, values: Tensor, offsets: Tensor, rows: Tensor, tiles: Tensor, block_m: int) -> None:
    stride_y = row_stride("row_affine", "y", y, y.dtype)
    width, num_tiles, block_n = y.shape[1], tiles.shape[0], block_n_for(block_m)
    if num_tiles == 0:
        return
    # Without fused multiply-add the kernel's bits are the reference's.
    _affine_kernel[(-(-width // block_n), num_tiles)](
        y, values, offsets, rows, tiles,
        width, stride_y,
        BLOCK_M=block_m, BLOCK_N=block_n, TILE_FIELDS=TILE_FIELDS, TILE_SLOT=TILE_SLOT, UNIT=UNIT,
        num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


torch.library.define(
    "multilora::row_affine",
    "(Tensor(a!) y, Tensor values, Tensor offsets, Tensor rows, Tensor tiles, int block_m) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("multilora::row_affine", ("cpu", "cuda"), _launch)
OP = torch.ops.multilora.row_affine.default


@torch.library.register_fake("multilora::row_affine")
def _fake(y: Tensor, values: Tensor, offsets: Tensor, rows: Tensor, tiles: Tensor, block_m: int) -> None:
    return None


def row_affine(y: Tensor, affine: Affine) -> None:
    """The kernel on CUDA (and under Triton's interpreter), else the reference.

    Computed in float32 and rounded to y's dtype once. Deterministic; y's other rows stay as they are bit for bit.

    Args:
        y: [T, N] bf16, fp16 or fp32, changed in place; rows may be strided.
        affine: vectors of width N; float32 whatever y is.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    values, offsets, segments = affine.values, affine.offsets, affine.segments
    if y.shape[0] != segments.plan.num_tokens:
        raise ValueError(f"row_affine: y has {y.shape[0]} rows, its plan {segments.plan.num_tokens} tokens")
    if values.dtype != torch.float32 or values.ndim != 1 or not values.is_contiguous():
        raise ValueError(f"row_affine: values must be contiguous float32 [n], got {values.dtype} {list(values.shape)}")
    if offsets.dtype != torch.int32 or offsets.ndim != 1 or not offsets.is_contiguous():
        raise ValueError(f"row_affine: offsets must be contiguous int32 [n], got {offsets.dtype} {list(offsets.shape)}")
    if not use_kernel(y):
        return row_affine_reference(y, affine)
    launch = OP if is_compiling() else _launch
    launch(y, values, offsets, segments.rows, segments.tiles, segments.plan.block_m)


def row_affine_reference(y: Tensor, affine: Affine) -> None:
    """What row_affine computes, in torch, adapter by adapter. Any device; reads the offsets on the host."""
    width, offsets = y.shape[1], affine.offsets.tolist()
    for group, tokens in affine.segments.by_adapter():
        start = offsets[group[TILE_SLOT]] * UNIT
        if start < 0:
            continue
        gain, shift = affine.values[start : start + 2 * width].split(width)
        y[tokens] = (y[tokens].float() * gain + shift).to(y.dtype)
