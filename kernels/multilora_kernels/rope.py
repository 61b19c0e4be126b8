# SPDX-License-Identifier: Apache-2.0
"""From the q/k/v linear to attention in one pass: LoRA, norm of q and k, rotary embedding, and k and v to their pages.

Base value and LoRA are summed in float32 and rounded once. From there the roundings are transformers': the norm rounds
as the model family does, x * cos and rotate_half(x) * sin are rounded before they are added. rotate_half pairs
dimension i with i + R / 2 of the first R; dimensions from R on pass as they are (Phi 3). Rows without adapter get the
same bits with a delta as without.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.compiler import is_compiling

from multilora_kernels._triton import row_stride, use_kernel
from multilora_kernels.delta import Delta
from multilora_kernels.grouped_expand import grouped_expand_reference
from multilora_kernels.rmsnorm import rmsnorm_reference
from multilora_kernels.rope_kernel import rope_kernel
from multilora_kernels.segments import RANK_PAGE, TILE_FIELDS
from multilora_kernels.variants import FEW_RANKS, LARGE_BLOCK_M, Passes, rank_passes

# Without LoRA a program takes this many values of one token, whole heads of q, k or v: at 2 warps two 16-byte loads of
# 16 bits a thread. 256 to 2,048 values and 1 to 4 warps are within noise: 3.5 us for 256 tokens of Llama-3.1-8B and
# 15.5 for 2,048 (H200, cold L2, 2026-11-27), 2.5 for 256 in a model.
VALUES_PER_PROGRAM, NUM_WARPS = 1024, 2
# With LoRA it takes a tile's rows of one head: 5.4 us for 256 tokens of 16 adapters, 24.8 for 2,048 of 4. 2 and 8 warps
# are no better (same card and day).
NUM_WARPS_SMALL_M, NUM_WARPS_LARGE_M = 4, 8
# As in grouped_expand: h is masked in registers, which a pipelined wgmma does not survive on sm_90.
NUM_STAGES = 1
# 16 adapters of rank 30, 16 of 8 to 64, one of 64 (H200, 2026-11-27): 256 rows take 5.6, 6.1 and 6.1 us, without a
# limit 5.6, 6.5 and 6.2, with norms 6.2, 6.7 for 7.3, 8.3; 2,048 rows of 8 adapters, in tiles of 32 rows, 26.1, 28.6
# and 31.8, with (32, 32) 26.3, 28.2 and 31.3.
PASSES = (Passes(FEW_RANKS, 0), Passes(32, 32, {16: 80}), Passes(32, 32, {16: 80}), Passes(32, 16, {16: 72, 32: 128}))

# Larger heads, and those that are rotary in part, need more registers than that: at 256 dimensions 11.4 us without the
# limit, 12.9 with it.
MAX_D_LIMITED = 128


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@lru_cache
def blocks_for(
    num_heads: int, num_kv_heads: int, d: int, rotary: int, with_delta: bool, values: int
) -> tuple[int, int, int, int]:
    """(groups of heads, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST), once per model."""
    heads = 1 if with_delta else max(1, values // _power_of_2(d))
    groups = -(-num_heads // heads) - 2 * (-num_kv_heads // heads)
    smallest = 16 if with_delta else 1  # what tl.dot needs
    return groups, heads, max(_power_of_2(rotary // 2), smallest), max(_power_of_2(d - rotary), smallest)


def _launch(
    q: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, gemma: bool, h: Tensor | None, b: Tensor | None, rows: Tensor | None, tiles:
    Tensor | None, block_m: int, rank_block: int,
) -> None:  # fmt: skip
    num_rows, num_heads, d = q.shape
    rotary = cos.shape[1]
    page_size, num_kv_heads = kv_cache.shape[2:4]
    if num_rows == 0:
        return
    stride_qkv = row_stride("rope_write", "qkv", qkv, q.dtype)
    if h is None or b is None or tiles is None:
        parts, num_warps, stride_h, stride_b = num_rows, NUM_WARPS, 0, 0
        passes = Passes(1, 0)
    else:
        parts, num_warps = tiles.shape[0], NUM_WARPS_LARGE_M if block_m >= LARGE_BLOCK_M else NUM_WARPS_SMALL_M
        passes = rank_passes(rank_block, num_rows, PASSES)
        stride_h, stride_b = row_stride("rope_write", "h", h, q.dtype), row_stride("rope_write", "b", b, q.dtype)
    groups, block_heads, block_half, block_rest = blocks_for(
        num_heads, num_kv_heads, d, rotary, h is not None, VALUES_PER_PROGRAM
    )
    # Without fused multiply-add: two forms of the kernel and torch's separate operators then agree in float32 too.
    rope_kernel[(groups, parts)](
        qkv, cos, sin, q, kv_cache, slots, q_norm, k_norm, h, b, rows, tiles,
        stride_qkv, kv_cache.stride(0), stride_h, stride_b, eps,
        HEADS=num_heads, KV_HEADS=num_kv_heads, PAGE_SIZE=page_size, D=d, R=rotary, GEMMA=gemma,
        BLOCK_HEADS=block_heads, BLOCK_M=block_m, BLOCK_R=passes.first, MORE_R=passes.more,
        BLOCK_HALF=block_half, BLOCK_REST=block_rest, TILE_FIELDS=TILE_FIELDS, RANK_PAGE=RANK_PAGE,
        num_warps=num_warps, num_stages=NUM_STAGES, enable_fp_fusion=False,
        maxnreg=passes.most_registers(block_m, q.itemsize) if rotary == d <= MAX_D_LIMITED else None,
    )  # fmt: skip


torch.library.define(
    "multilora::rope_write",
    "(Tensor(a!) q, Tensor qkv, Tensor cos, Tensor sin, Tensor(b!) kv_cache, Tensor slots, Tensor? q_norm,"
    " Tensor? k_norm, float eps, bool gemma, Tensor? h, Tensor? b, Tensor? rows, Tensor? tiles, int block_m,"
    " int rank_block) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("multilora::rope_write", ("cpu", "cuda"), _launch)
OP = torch.ops.multilora.rope_write.default


@torch.library.register_fake("multilora::rope_write")
def _fake(*arguments: object) -> None:
    return None


@lru_cache
def _check_model(
    columns: int, cache: torch.Size, strides: tuple[int, ...], rotary: int, num_heads: int, num_kv_heads: int
) -> None:
    """What is the same in every step, hence checked once."""
    two, page_size, heads, d = cache[1:]
    if two != 2 or heads != num_kv_heads or strides[1:] != (page_size * heads * d, heads * d, d, 1):
        raise ValueError(
            f"rope_write: kv_cache must be [pages, 2, page_size, {num_kv_heads}, D] and dense within a page, "
            f"got {list(cache)} with strides {strides}"
        )
    if columns != (num_heads + 2 * num_kv_heads) * d:
        raise ValueError(
            f"rope_write: qkv must have (num_heads + 2 * num_kv_heads) * D = {num_heads + 2 * num_kv_heads} * {d} "
            f"columns, got {columns}"
        )
    if rotary % 2 or not 0 < rotary <= d:
        raise ValueError(f"rope_write: the rotary width must be even and at most D = {d}, got {rotary}")


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, num_heads: int, num_kv_heads: int, q_norm:
    Tensor | None, k_norm: Tensor | None, delta: Delta | None, out: Tensor | None,
) -> None:  # fmt: skip
    (rows, columns), angles, dtype = qkv.shape, cos.shape, qkv.dtype
    if not (angles[0] == rows and sin.shape == angles and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(
            f"rope_write: cos and sin must be contiguous and of one shape with {rows} rows as qkv, "
            f"got {list(angles)} and {list(sin.shape)}"
        )
    _check_model(columns, kv_cache.shape, kv_cache.stride(), angles[1], num_heads, num_kv_heads)
    if not (kv_cache.dtype == cos.dtype == sin.dtype == dtype):
        raise ValueError(
            f"rope_write: kv_cache, cos and sin must have dtype {dtype} as qkv, "
            f"got {kv_cache.dtype}, {cos.dtype} and {sin.dtype}"
        )
    if slots.shape != (rows,):
        raise ValueError(f"rope_write: slots must be [{rows}], got {list(slots.shape)}")
    if q_norm is not None or k_norm is not None:
        d = kv_cache.shape[4]
        if q_norm is None or k_norm is None:
            raise ValueError("rope_write: q_norm and k_norm must be given both or not at all")
        if not q_norm.shape == k_norm.shape == (d,):
            raise ValueError(
                f"rope_write: q_norm and k_norm must be [{d}], got {list(q_norm.shape)}, {list(k_norm.shape)}"
            )
    if delta is not None:
        delta.require("rope_write", "qkv", rows, columns)
    if out is not None and not (
        out.shape == (rows, num_heads, kv_cache.shape[4]) and out.dtype == dtype and out.is_contiguous()
    ):
        raise ValueError(
            f"rope_write: out must be contiguous {dtype} {[rows, num_heads, kv_cache.shape[4]]}, "
            f"got {out.dtype} {list(out.shape)} with strides {out.stride()}"
        )


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    gemma: bool = False,
    delta: Delta | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns the queries as attention wants them and writes the keys and values into their pages. Deterministic.

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * D] bf16, fp16 or fp32, rows may be strided; q's heads, then k's, then
            v's. Not changed.
        cos, sin: [T, R] contiguous, qkv's dtype; R even, the rotary width, at most D.
        kv_cache: [pages, 2, page_size, num_kv_heads, D], qkv's dtype, keys at 0 and values at 1; changed in place.
        slots: int32 [T], page * page_size + offset of each token, no two alike (but for a page that nobody reads).
        q_norm, k_norm: [D] weights of an RMSNorm of each head of q and k before rope (Qwen 3, Gemma 3), or None.
        eps, gemma: of those norms, as in add_rmsnorm.
        delta: three slices q, k and v, in qkv's dtype; None launches the kernel that reads no tiles.
        out: [T, num_heads, D] contiguous, qkv's dtype, for the queries; None allocates it.

    Returns: out, the queries. The kernel runs on CUDA (and under Triton's interpreter), else the
    reference.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    _check(qkv, cos, sin, kv_cache, slots, num_heads, num_kv_heads, q_norm, k_norm, delta, out)
    if not use_kernel(qkv):
        return rope_write_reference(
            qkv, cos, sin, kv_cache, slots, num_heads, num_kv_heads, q_norm, k_norm, eps, gemma, delta, out
        )
    q = qkv.new_empty((qkv.shape[0], num_heads, kv_cache.shape[4])) if out is None else out
    launch = OP if is_compiling() else _launch
    if delta is None:
        launch(q, qkv, cos, sin, kv_cache, slots, q_norm, k_norm, eps, gemma, None, None, None, None, 1, 1)
        return q
    segments = delta.segments
    plan = segments.plan
    launch(
        q, qkv, cos, sin, kv_cache, slots, q_norm, k_norm, eps, gemma,
        delta.h, delta.b, segments.rows, segments.tiles, plan.block_m, plan.rank_block,
    )  # fmt: skip
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    turning = x[..., :rotary]
    low, high = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-high, low), dim=-1) * sin
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), dim=-1)


def rope_write_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    gemma: bool = False,
    delta: Delta | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What rope_write computes, by the operators that transformers' models use. Any device."""
    page_size, d = kv_cache.shape[2], kv_cache.shape[4]
    if delta is not None:
        qkv = qkv.clone()
        grouped_expand_reference(qkv, delta, (num_heads * d, num_kv_heads * d, num_kv_heads * d))
    q, k, v = qkv.unflatten(1, (-1, d)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rmsnorm_reference(q, q_norm, eps, gemma), rmsnorm_reference(k, k_norm, eps, gemma)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    pages, offsets = slots // page_size, slots % page_size
    kv_cache[pages, 0, offsets] = _rotate(k, cos, sin)
    kv_cache[pages, 1, offsets] = v
    q = _rotate(q, cos, sin)
    return q if out is None else out.copy_(q)
