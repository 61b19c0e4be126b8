# SPDX-License-Identifier: Apache-2.0
"""From the q/k/v linear to attention in one pass: LoRA, norm of q and k, rotary embedding, and k and v to their pages.

Base value and LoRA are summed in float32 and rounded once. From there the roundings are transformers': the norm rounds
as the model family does, x * cos and rotate_half(x) * sin are rounded before they are added. rotate_half pairs
dimension i with i + R / 2 of the first R; dimensions from R on pass as they are (Phi 3). Rows without adapter get the
same bits with a delta as without.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from multilora_kernels._triton import jit, require_layout, tl, triton, use_kernel
from multilora_kernels.delta import Delta
from multilora_kernels.grouped_expand import grouped_expand_reference
from multilora_kernels.rmsnorm import rmsnorm_reference, scale_rows
from multilora_kernels.segments import LARGE_BLOCK_M, RANK_PAGE, TILE_FIELDS

# Not measured yet. Without LoRA a program takes this many values of one token, whole heads of q, k or v: at 2 warps two
# 16-byte loads of 16 bits a thread, 2 KiB in flight. With LoRA it takes a tile's rows of one head.
VALUES_PER_PROGRAM, NUM_WARPS = 1024, 2
NUM_WARPS_SMALL_M, NUM_WARPS_LARGE_M = 4, 8
# As in grouped_expand: h is masked in registers, which a pipelined wgmma does not survive on sm_90.
NUM_STAGES = 1


@jit
def _rounded_sum(x, y, DTYPE: tl.constexpr):
    """x + y with each of them and the sum rounded to DTYPE."""
    return (x.to(DTYPE).to(tl.float32) + y.to(DTYPE).to(tl.float32)).to(DTYPE)


@jit
def _rope_kernel(
    qkv, cos, sin, q, kv_cache, slots, q_norm, k_norm, h, b, order, tiles,
    stride_qkv, stride_page, stride_h, stride_b, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    GEMMA: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, TILE_FIELDS: tl.constexpr, RANK_PAGE: tl.constexpr,
):  # fmt: skip
    # A block is [rows, dimensions]; its rows are heads of one token, or with LoRA the tokens of a tile at one head.
    dtype: tl.constexpr = q.dtype.element_ty
    Q_GROUPS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_GROUPS: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    # Axis 0 counts the groups of heads of q, then of k, then of v; none holds heads of two of them.
    group = tl.program_id(0)
    kind = tl.where(group < Q_GROUPS, 0, tl.where(group < Q_GROUPS + KV_GROUPS, 1, 2))
    first_head = (group - tl.where(kind == 0, 0, Q_GROUPS + (kind - 1) * KV_GROUPS)) * BLOCK_HEADS
    head = first_head + tl.arange(0, BLOCK_HEADS)
    column = (head + tl.where(kind == 0, 0, HEADS + (kind - 1) * KV_HEADS)) * D
    if tiles is None:
        token = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
        row_ok = head < tl.where(kind == 0, HEADS, KV_HEADS)
    else:
        tile = tiles + TILE_FIELDS * tl.program_id(1)
        first_row, end_row, rank_start, rank = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
        if first_row == end_row:
            return
        # Both are whole pages: the hint makes the loads of h vectors.
        h_start = tl.multiple_of(tl.load(tile + 4), RANK_PAGE)
        h_stride = tl.multiple_of(tl.load(tile + 5), RANK_PAGE)
        padded = tl.multiple_of((rank + RANK_PAGE - 1) // RANK_PAGE * RANK_PAGE, RANK_PAGE)
        row = first_row + tl.arange(0, BLOCK_M)
        row_ok = row < end_row
        token = tl.load(order + row, mask=row_ok, other=0).to(tl.int64)

    # Dimensions i and i + R / 2 make a pair; dimensions j lie behind the rotary ones. Everything is asked for here and
    # converted where it is used: an earlier `.to` is a barrier that waits for one load before the next is asked for.
    i = tl.arange(0, BLOCK_HALF)
    j = R + tl.arange(0, BLOCK_REST)
    i_ok, j_ok = i < R // 2, j < D
    ok, rest_ok = row_ok[:, None] & i_ok[None, :], row_ok[:, None] & j_ok[None, :]
    x_at = qkv + token[:, None] * stride_qkv + column[:, None] + i[None, :]
    rest_at = qkv + token[:, None] * stride_qkv + column[:, None] + j[None, :]
    low, high = tl.load(x_at, mask=ok, other=0.0), tl.load(x_at + R // 2, mask=ok, other=0.0)
    if R < D:
        rest = tl.load(rest_at, mask=rest_ok, other=0.0)
    # Masks of the whole block, also for what all rows share: a block of one row would be read element by element.
    angle_at, angle_ok = token[:, None] * R + i[None, :], ok & (kind < 2)
    cos_low = tl.load(cos + angle_at, mask=angle_ok, other=0.0)
    cos_high = tl.load(cos + angle_at + R // 2, mask=angle_ok, other=0.0)
    sin_low = tl.load(sin + angle_at, mask=angle_ok, other=0.0)
    sin_high = tl.load(sin + angle_at + R // 2, mask=angle_ok, other=0.0)
    slot = tl.load(slots + token).to(tl.int64)
    if q_norm is not None:
        weight = q_norm
        if kind > 0:
            weight = k_norm
        low_weight = tl.load(weight + i[None, :], mask=ok, other=0.0)
        high_weight = tl.load(weight + R // 2 + i[None, :], mask=ok, other=0.0)
        if R < D:
            rest_weight = tl.load(weight + j[None, :], mask=rest_ok, other=0.0)

    if tiles is not None:
        h_rows = h + token[:, None] * stride_h + (h_start * 3 + kind * h_stride)
        # -0.0, which a literal would not give: added to the base of rows without adapter it changes no bit.
        low_sum = tl.zeros((BLOCK_M, BLOCK_HALF), dtype=tl.float32) * -1.0
        high_sum = low_sum
        rest_sum = tl.zeros((BLOCK_M, BLOCK_REST), dtype=tl.float32) * -1.0
        for first_r in range(0, rank, BLOCK_R):
            r = first_r + tl.arange(0, BLOCK_R)
            r_ok = r < rank
            b_rows = b + (rank_start + r)[:, None].to(tl.int64) * stride_b + column[None, :]
            b_ok = r_ok[:, None] & i_ok[None, :]
            h_tile = tl.load(h_rows + r[None, :], mask=row_ok[:, None] & (r < padded)[None, :], other=0.0)
            b_low = tl.load(b_rows + i[None, :], mask=b_ok, other=0.0)
            b_high = tl.load(b_rows + R // 2 + i[None, :], mask=b_ok, other=0.0)
            if R < D:
                b_rest = tl.load(b_rows + j[None, :], mask=r_ok[:, None] & j_ok[None, :], other=0.0)
            # h was read by whole pages: ranks beyond may be NaN, hence a selection and no product with zero. B needs
            # none, but a tile that goes to shared memory as loaded goes there, and waits, before the next load.
            h_tile = tl.where(r_ok[None, :], h_tile, 0.0)
            b_low, b_high = tl.where(r_ok[:, None], b_low, 0.0), tl.where(r_ok[:, None], b_high, 0.0)
            low_sum = tl.dot(h_tile, b_low, low_sum, input_precision="ieee")
            high_sum = tl.dot(h_tile, b_high, high_sum, input_precision="ieee")
            if R < D:
                b_rest = tl.where(r_ok[:, None], b_rest, 0.0)
                rest_sum = tl.dot(h_tile, b_rest, rest_sum, input_precision="ieee")
        low, high = (low.to(tl.float32) + low_sum).to(dtype), (high.to(tl.float32) + high_sum).to(dtype)
        if R < D:
            rest = (rest.to(tl.float32) + rest_sum).to(dtype)

    if kind < 2:
        if q_norm is not None:
            low_x, high_x = low.to(tl.float32), high.to(tl.float32)
            # In float64, where the order does not matter: it is another after a dot than after a load.
            squares = tl.sum((low_x * low_x + high_x * high_x).to(tl.float64), axis=1)
            if R < D:
                rest_x = rest.to(tl.float32)
                squares += tl.sum((rest_x * rest_x).to(tl.float64), axis=1)
            inverse_rms = tl.rsqrt(squares.to(tl.float32) / D + eps)[:, None]
            low = scale_rows(low_x, inverse_rms, low_weight, GEMMA, dtype)
            high = scale_rows(high_x, inverse_rms, high_weight, GEMMA, dtype)
            if R < D:
                rest = scale_rows(rest_x, inverse_rms, rest_weight, GEMMA, dtype)
        low_x, high_x = low.to(tl.float32), high.to(tl.float32)
        low = _rounded_sum(low_x * cos_low.to(tl.float32), -high_x * sin_low.to(tl.float32), dtype)
        high = _rounded_sum(high_x * cos_high.to(tl.float32), low_x * sin_high.to(tl.float32), dtype)

    if kind == 0:
        out_rows = q + token[:, None] * (HEADS * D) + (head * D)[:, None]
    else:
        in_page = (slot % PAGE_SIZE + (kind - 1) * PAGE_SIZE) * (KV_HEADS * D)
        out_rows = kv_cache + (slot // PAGE_SIZE * stride_page + in_page)[:, None] + (head * D)[:, None]
    tl.store(out_rows + i[None, :], low, mask=ok)
    tl.store(out_rows + R // 2 + i[None, :], high, mask=ok)
    if R < D:
        tl.store(out_rows + j[None, :], rest, mask=rest_ok)


@cache
def blocks_for(num_heads: int, num_kv_heads: int, d: int, rotary: int, with_delta: bool) -> tuple[int, dict[str, int]]:
    """(groups of heads, the kernel's blocks), once per model: Triton's own helpers take 1.5 us a call."""
    heads = 1 if with_delta else max(1, VALUES_PER_PROGRAM // triton.next_power_of_2(d))
    groups = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    # tl.dot needs 16 columns.
    half, rest = (triton.next_power_of_2(width) for width in (rotary // 2, d - rotary))
    smallest = 16 if with_delta else 1
    return groups, {"BLOCK_HEADS": heads, "BLOCK_HALF": max(half, smallest), "BLOCK_REST": max(rest, smallest)}


def _launch(
    q: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, gemma: bool, h: Tensor | None, b: Tensor | None, order: Tensor | None, tiles:
    Tensor | None, block_m: int, rank_block: int,
) -> None:  # fmt: skip
    rows, rotary = cos.shape
    num_heads = q.shape[1]
    page_size, num_kv_heads, d = kv_cache.shape[2:]
    if rows == 0:
        return
    if h is None or b is None or tiles is None:
        require_layout("rope_write", qkv.dtype, qkv=qkv, cos=cos, sin=sin, kv_cache=kv_cache)
        parts, num_warps, stride_h, stride_b = rows, NUM_WARPS, 0, 0
    else:
        require_layout("rope_write", qkv.dtype, qkv=qkv, cos=cos, sin=sin, kv_cache=kv_cache, h=h, b=b)
        parts, stride_h, stride_b = tiles.shape[0], h.stride(0), b.stride(0)
        num_warps = NUM_WARPS_LARGE_M if block_m >= LARGE_BLOCK_M else NUM_WARPS_SMALL_M
    groups, blocks = blocks_for(num_heads, num_kv_heads, d, rotary, with_delta=h is not None)
    # Without fused multiply-add: two forms of the kernel and torch's separate operators then agree in float32 too.
    _rope_kernel[(groups, parts)](
        qkv, cos, sin, q, kv_cache, slots, q_norm, k_norm, h, b, order, tiles,
        qkv.stride(0), kv_cache.stride(0), stride_h, stride_b, eps,
        HEADS=num_heads, KV_HEADS=num_kv_heads, PAGE_SIZE=page_size, D=d, R=rotary, GEMMA=gemma,
        BLOCK_M=block_m, BLOCK_R=rank_block, **blocks,
        TILE_FIELDS=TILE_FIELDS, RANK_PAGE=RANK_PAGE,
        num_warps=num_warps, num_stages=NUM_STAGES, enable_fp_fusion=False,
    )  # fmt: skip


torch.library.define(
    "multilora::rope_write",
    "(Tensor(a!) q, Tensor qkv, Tensor cos, Tensor sin, Tensor(b!) kv_cache, Tensor slots, Tensor? q_norm,"
    " Tensor? k_norm, float eps, bool gemma, Tensor? h, Tensor? b, Tensor? order, Tensor? tiles, int block_m,"
    " int rank_block) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("multilora::rope_write", ("cpu", "cuda"), _launch)


@torch.library.register_fake("multilora::rope_write")
def _fake(*arguments: object) -> None:
    return None


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, num_heads: int, num_kv_heads: int, q_norm:
    Tensor | None, k_norm: Tensor | None, delta: Delta | None, out: Tensor | None,
) -> None:  # fmt: skip
    rows, columns = qkv.shape
    two, page_size, heads, d = kv_cache.shape[1:]
    inner = (page_size * heads * d, heads * d, d, 1)
    if two != 2 or heads != num_kv_heads or kv_cache.stride()[1:] != inner:
        raise ValueError(
            f"rope_write: kv_cache must be [pages, 2, page_size, {num_kv_heads}, D] and dense within a page, "
            f"got {list(kv_cache.shape)} with strides {kv_cache.stride()}"
        )
    if columns != (num_heads + 2 * num_kv_heads) * d:
        raise ValueError(
            f"rope_write: qkv must have (num_heads + 2 * num_kv_heads) * D = {num_heads + 2 * num_kv_heads} * {d} "
            f"columns, got {columns}"
        )
    rotary = cos.shape[1]
    if not (cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape == (rows, rotary)):
        raise ValueError(
            f"rope_write: cos and sin must be contiguous and of one shape with {rows} rows as qkv, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if rotary % 2 or not 0 < rotary <= d:
        raise ValueError(f"rope_write: the rotary width must be even and at most D = {d}, got {rotary}")
    if slots.shape != (rows,):
        raise ValueError(f"rope_write: slots must be [{rows}], got {list(slots.shape)}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_write: q_norm and k_norm must be given both or not at all")
    if q_norm is not None and k_norm is not None and not q_norm.shape == k_norm.shape == (d,):
        raise ValueError(f"rope_write: q_norm and k_norm must be [{d}], got {list(q_norm.shape)}, {list(k_norm.shape)}")
    if delta is not None and not (
        delta.b.shape[1] == columns and rows == delta.h.shape[0] == delta.segments.plan.num_tokens
    ):
        raise ValueError(
            f"rope_write: qkv is {rows} x {columns}, but delta has {delta.b.shape[1]} columns in b, "
            f"{delta.h.shape[0]} rows in h and a plan for {delta.segments.plan.num_tokens} tokens"
        )
    if out is not None and not (
        out.shape == (rows, num_heads, d) and out.dtype == qkv.dtype and out.is_contiguous()
    ):
        raise ValueError(
            f"rope_write: out must be contiguous {qkv.dtype} {[rows, num_heads, d]}, "
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
    op = torch.ops.multilora.rope_write.default
    if delta is None:
        op(q, qkv, cos, sin, kv_cache, slots, q_norm, k_norm, eps, gemma, None, None, None, None, 1, 1)
        return q
    segments = delta.segments
    plan = segments.plan
    op(
        q, qkv, cos, sin, kv_cache, slots, q_norm, k_norm, eps, gemma,
        delta.h, delta.b, segments.order, segments.tiles, plan.block_m, plan.rank_block,
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
