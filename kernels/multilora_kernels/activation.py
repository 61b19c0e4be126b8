# SPDX-License-Identifier: Apache-2.0
"""act(gate) * up between a fused gate/up linear and the down linear, with the gate's and up's LoRA added on the way.

Base value and LoRA are summed in float32 and rounded once; act(gate) is rounded to the model's dtype before it is
multiplied, as transformers does. Rows without adapter get the same bits with a delta as without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from multilora_kernels._triton import jit, row_stride, tl, use_kernel
from multilora_kernels.delta import Delta
from multilora_kernels.grouped_expand import grouped_expand_reference, load_b, load_h
from multilora_kernels.segments import RANK_PAGE, TILE_FIELDS
from multilora_kernels.tiles import load_tokens
from multilora_kernels.variants import FEW_RANKS, LARGE_BLOCK_M, Passes, rank_passes

# Without LoRA a thread has one 16-byte load of gate and one of up in flight. BLOCK_N 512 to 2,048 and 2 to 8 warps are
# within noise: 6.8 us for 256 tokens of Llama-3.1-8B, 44.5 for 2,048 (H200, cold L2, 2026-11-27).
BLOCK_N, NUM_WARPS = 1024, 4
# With LoRA a program of BLOCK_M 16 and rank 16 asks for 16 KiB, half of them B, before it waits for any; at 56
# registers 9 programs fit an SM. 12.1 us for 256 tokens of 16 adapters, 56 for 2,048 of 4 (H200, B cold, 2026-11-27).
# When it had 72, 64 columns and 2 warps took 12.1 us where it took 9.4, 256 and 8 warps 11.5, 512 17.8.
BLOCK_N_DELTA, NUM_WARPS_SMALL_M, NUM_WARPS_LARGE_M = 128, 4, 8
# From BLOCK_M 64 the dot is a wgmma whose left operand is in registers (h is masked after the load); pipelined, such a
# loop is miscompiled for sm_90 by ptxas before 13.3. Most ranks are one block, which leaves nothing to pipeline.
NUM_STAGES = 1
# Few ranks without the limit: ptxas, which then uses as many registers, waits for the first part of B before it has
# asked for gate and up. Any ranks: 16 adapters of rank 30, 16 of 8 to 64, one of 64 (H200, 2026-11-27), 64 rows 13.0,
# 14.5 and 7.6 us, without a limit 13.8, 15.7 and 7.0, with (16, 16) 13.0, 13.8 and 7.5, but then a row of rank 64 takes
# 6.9 for 4.9; 256 rows 17.0, 17.1 and 18.6, without a limit 17.2, 17.9 and 18.3, with (32, 32) 17.8, 18.8 and 18.9.
# 2,048 rows of 8 adapters, in tiles of 32 rows, 70.5, 74.8 and 91, with (16, 16) 75.0, 74.0 and 93.
PASSES = (
    Passes(FEW_RANKS, 0, {16: 56}),
    Passes(32, 32, {16: 80}),
    Passes(16, 16, {16: 80}),
    Passes(32, 16, {16: 72, 32: 128}),
)
KINDS = ("silu", "gelu_tanh")


@jit
def _activation_kernel(
    gate_up, out, h, b, rows, tiles,
    width, stride_gate_up, stride_h, stride_b,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    MORE_R: tl.constexpr, TILE_FIELDS: tl.constexpr, RANK_PAGE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < width
    if tiles is None:
        token = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
        ok = n_ok[None, :]
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
        ok = row_ok[:, None] & n_ok[None, :]

    gate_at = gate_up + token[:, None] * stride_gate_up + n[None, :]
    # Converted where they are used: an earlier `.to` is a barrier that waits for them before h is asked for.
    gate = tl.load(gate_at, mask=ok, other=0.0)
    up = tl.load(gate_at + width, mask=ok, other=0.0)
    if tiles is not None:
        r = tl.arange(0, BLOCK_R)
        b_at = b + rank_start.to(tl.int64) * stride_b + n[None, :]
        gate_b, up_b = load_b(b_at, r, rank, stride_b, n_ok), load_b(b_at + width, r, rank, stride_b, n_ok)
        h_rows = h + token[:, None] * stride_h + h_start * 2
        gate_h, up_h = load_h(h_rows, r, rank, row_ok, RANK_PAGE), load_h(h_rows + h_stride, r, rank, row_ok, RANK_PAGE)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if tiles is not None:
        # The base value is what the sum starts from; without ranks nothing may be added, not even 0.0 to -0.0.
        if rank > 0:
            gate = tl.dot(gate_h, gate_b, gate, input_precision="ieee")
            up = tl.dot(up_h, up_b, up, input_precision="ieee")
            if MORE_R > 0:
                for first_r in range(BLOCK_R, rank, MORE_R):
                    more = first_r + tl.arange(0, MORE_R)
                    gate_b_more = load_b(b_at, more, rank, stride_b, n_ok)
                    up_b_more = load_b(b_at + width, more, rank, stride_b, n_ok)
                    gate_h_more = load_h(h_rows, more, rank, row_ok, RANK_PAGE)
                    up_h_more = load_h(h_rows + h_stride, more, rank, row_ok, RANK_PAGE)
                    gate = tl.dot(gate_h_more, gate_b_more, gate, input_precision="ieee")
                    up = tl.dot(up_h_more, up_b_more, up, input_precision="ieee")
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)

    # Both are gate * sigmoid(z), for (1 + tanh(z / 2)) / 2 is sigmoid(z).
    if KIND == "silu":
        z = gate
    else:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    # exp2 and rsqrt are one instruction each; exp and the division take eleven more for denormals, which would make
    # instructions the limit.
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * z))
    activated = (gate * (root * root)).to(dtype).to(tl.float32)
    tl.store(out + token[:, None] * width + n[None, :], (activated * up).to(dtype), mask=ok)


def _launch(
    gate_up: Tensor,
    kind: str,
    h: Tensor | None,
    b: Tensor | None,
    rows: Tensor | None,
    tiles: Tensor | None,
    block_m: int,
    rank_block: int,
) -> Tensor:
    num_rows, columns = gate_up.shape
    width = columns // 2
    dtype = gate_up.dtype
    out = gate_up.new_empty((num_rows, width))
    if num_rows == 0:
        return out
    stride_gate_up = row_stride("gated_activation", "gate_up", gate_up, dtype)
    if h is None or b is None or tiles is None:
        stride_h, stride_b, parts = 0, 0, num_rows
        block_n, num_warps, passes = BLOCK_N, NUM_WARPS, Passes(1, 0)
    else:
        stride_h = row_stride("gated_activation", "h", h, dtype)
        stride_b = row_stride("gated_activation", "b", b, dtype)
        parts = tiles.shape[0]
        passes = rank_passes(rank_block, num_rows, PASSES)
        large = block_m >= LARGE_BLOCK_M
        block_n, num_warps = BLOCK_N_DELTA, NUM_WARPS_LARGE_M if large else NUM_WARPS_SMALL_M
    # Without fused multiply-add: two forms of the kernel and torch's separate operators then agree in float32 too.
    _activation_kernel[(-(-width // block_n), parts)](
        gate_up, out, h, b, rows, tiles,
        width, stride_gate_up, stride_h, stride_b,
        KIND=kind, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=passes.first,
        MORE_R=passes.more, TILE_FIELDS=TILE_FIELDS, RANK_PAGE=RANK_PAGE,
        num_warps=num_warps, num_stages=NUM_STAGES, enable_fp_fusion=False,
        maxnreg=passes.most_registers(block_m, dtype.itemsize),
    )  # fmt: skip
    return out


torch.library.define(
    "multilora::gated_activation",
    "(Tensor gate_up, str kind, Tensor? h, Tensor? b, Tensor? rows, Tensor? tiles, int block_m, int rank_block)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("multilora::gated_activation", ("cpu", "cuda"), _launch)
OP = torch.ops.multilora.gated_activation.default


@torch.library.register_fake("multilora::gated_activation")
def _fake(
    gate_up: Tensor,
    kind: str,
    h: Tensor | None,
    b: Tensor | None,
    rows: Tensor | None,
    tiles: Tensor | None,
    block_m: int,
    rank_block: int,
) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def gated_activation(gate_up: Tensor, kind: str, delta: Delta | None = None) -> Tensor:
    """act(gate) * up, of gate and up with their LoRA if there is a delta. Deterministic.

    Args:
        gate_up: [T, 2 * I] bf16, fp16 or fp32, rows may be strided; gate's columns first. Not changed.
        kind: "silu" (Llama, Qwen, Mistral, Phi 3) or "gelu_tanh" (Gemma: gelu_pytorch_tanh).
        delta: two slices of width I, in gate_up's dtype; None launches the kernel that reads no tiles.

    Returns: [T, I] contiguous. The kernel runs on CUDA (and under Triton's interpreter), else the reference.

    Raises:
        ValueError: kind is unknown; shapes, dtypes or layouts do not fit.
    """
    rows, columns = gate_up.shape
    if kind not in KINDS:
        raise ValueError(f"gated_activation: kind must be one of {KINDS}, got {kind!r}")
    if columns % 2:
        raise ValueError(f"gated_activation: gate_up must have an even number of columns, got {columns}")
    if delta is not None:
        delta.require("gated_activation", "gate_up", rows, columns)
    if not use_kernel(gate_up):
        return gated_activation_reference(gate_up, kind, delta)
    launch = OP if is_compiling() else _launch
    if delta is None:
        return launch(gate_up, kind, None, None, None, None, 1, 1)
    segments = delta.segments
    plan = segments.plan
    return launch(gate_up, kind, delta.h, delta.b, segments.rows, segments.tiles, plan.block_m, plan.rank_block)


def gated_activation_reference(gate_up: Tensor, kind: str, delta: Delta | None = None) -> Tensor:
    """What gated_activation computes, by the operators that transformers' models use. Any device."""
    if delta is not None:
        gate_up = gate_up.clone()
        width = gate_up.shape[1] // 2
        grouped_expand_reference(gate_up, delta, (width, width))
    gate, up = gate_up.chunk(2, dim=1)
    activated = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")
    return activated.mul_(up)
