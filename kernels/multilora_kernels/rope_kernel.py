# SPDX-License-Identifier: Apache-2.0
"""The kernel of rope_write, with and without LoRA."""

from __future__ import annotations

from multilora_kernels._triton import jit, tl
from multilora_kernels.grouped_expand import load_b, load_h
from multilora_kernels.rmsnorm import scale_rows
from multilora_kernels.tiles import load_tokens


@jit
def _rounded_sum(x, y, DTYPE: tl.constexpr):
    """x + y with each of them and the sum rounded to DTYPE, in float32."""
    return (x.to(DTYPE).to(tl.float32) + y.to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)


@jit
def rope_kernel(
    qkv, cos, sin, q, kv_cache, slots, q_norm, k_norm, h, b, rows, tiles,
    stride_qkv, stride_page, stride_h, stride_b, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    GEMMA: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, MORE_R: tl.constexpr,
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
        token = load_tokens(rows, BLOCK_M)
        if first_row == end_row:
            return
        # Both are whole pages: the hint makes the loads of h vectors.
        h_start = tl.multiple_of(tl.load(tile + 4), RANK_PAGE)
        h_stride = tl.multiple_of(tl.load(tile + 5), RANK_PAGE)
        row_ok = token >= 0
    # Dimensions i and i + R / 2 make a pair; dimensions j lie behind the rotary ones. Everything is asked for here and
    # converted where it is used: an earlier `.to` is a barrier that waits for one load before the next is asked for.
    i = tl.arange(0, BLOCK_HALF)
    j = R + tl.arange(0, BLOCK_REST)
    i_ok, j_ok = i < R // 2, j < D
    if tiles is not None:
        r = tl.arange(0, BLOCK_R)
        b_rows = b + rank_start.to(tl.int64) * stride_b + column[None, :]
        b_low = load_b(b_rows + i[None, :], r, rank, stride_b, i_ok)
        b_high = load_b(b_rows + R // 2 + i[None, :], r, rank, stride_b, i_ok)
        if R < D:
            b_rest = load_b(b_rows + j[None, :], r, rank, stride_b, j_ok)
        h_rows = h + token[:, None] * stride_h + (h_start * 3 + kind * h_stride)
        h_tile = load_h(h_rows, r, rank, row_ok, RANK_PAGE)
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
    slot = tl.load(slots + tl.maximum(token, 0)).to(tl.int64)
    if q_norm is not None:
        weight = q_norm
        if kind > 0:
            weight = k_norm
        low_weight = tl.load(weight + i[None, :], mask=ok, other=0.0)
        high_weight = tl.load(weight + R // 2 + i[None, :], mask=ok, other=0.0)
        if R < D:
            rest_weight = tl.load(weight + j[None, :], mask=rest_ok, other=0.0)

    low, high = low.to(tl.float32), high.to(tl.float32)
    if R < D:
        rest = rest.to(tl.float32)
    if tiles is not None:
        # The base value is what the sum starts from; without ranks nothing may be added, not even 0.0 to -0.0.
        if rank > 0:
            low = tl.dot(h_tile, b_low, low, input_precision="ieee")
            high = tl.dot(h_tile, b_high, high, input_precision="ieee")
            if R < D:
                rest = tl.dot(h_tile, b_rest, rest, input_precision="ieee")
            if MORE_R > 0:
                for first_r in range(BLOCK_R, rank, MORE_R):
                    more = first_r + tl.arange(0, MORE_R)
                    h_more = load_h(h_rows, more, rank, row_ok, RANK_PAGE)
                    low_more = load_b(b_rows + i[None, :], more, rank, stride_b, i_ok)
                    high_more = load_b(b_rows + R // 2 + i[None, :], more, rank, stride_b, i_ok)
                    low = tl.dot(h_more, low_more, low, input_precision="ieee")
                    high = tl.dot(h_more, high_more, high, input_precision="ieee")
                    if R < D:
                        rest_more = load_b(b_rows + j[None, :], more, rank, stride_b, j_ok)
                        rest = tl.dot(h_more, rest_more, rest, input_precision="ieee")
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        if R < D:
            rest = rest.to(dtype).to(tl.float32)

    if kind < 2:
        if q_norm is not None:
            # In float64, where the order does not matter: it is another after a dot than after a load.
            squares = tl.sum((low * low + high * high).to(tl.float64), axis=1)
            if R < D:
                squares += tl.sum((rest * rest).to(tl.float64), axis=1)
            inverse_rms = tl.rsqrt(squares.to(tl.float32) / D + eps)[:, None]
            low = scale_rows(low, inverse_rms, low_weight, GEMMA, dtype).to(tl.float32)
            high = scale_rows(high, inverse_rms, high_weight, GEMMA, dtype).to(tl.float32)
            if R < D:
                rest = scale_rows(rest, inverse_rms, rest_weight, GEMMA, dtype).to(tl.float32)
        cosines, sines = low * cos_low.to(tl.float32), -high * sin_low.to(tl.float32)
        high = _rounded_sum(high * cos_high.to(tl.float32), low * sin_high.to(tl.float32), dtype)
        low = _rounded_sum(cosines, sines, dtype)

    if kind == 0:
        out_rows = q + token[:, None] * (HEADS * D) + (head * D)[:, None]
    else:
        in_page = (slot % PAGE_SIZE + (kind - 1) * PAGE_SIZE) * (KV_HEADS * D)
        out_rows = kv_cache + (slot // PAGE_SIZE * stride_page + in_page)[:, None] + (head * D)[:, None]
    tl.store(out_rows + i[None, :], low.to(dtype), mask=ok)
    tl.store(out_rows + R // 2 + i[None, :], high.to(dtype), mask=ok)
    if R < D:
        tl.store(out_rows + j[None, :], rest.to(dtype), mask=rest_ok)
