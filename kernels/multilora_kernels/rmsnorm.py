# SPDX-License-Identifier: Apache-2.0
"""The residual stream between two linears in one pass: (inner norm,) residual add, RMSNorm.

Two roundings exist among the models. Llama and its kin round x / rms(x) to the model's dtype and then multiply by the
weight; Gemma multiplies by 1 + weight in float32 and rounds once. With an `inner_weight` the linear's output is
normalised before it is added, as Gemma 2 and 3 do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from multilora_kernels._triton import jit, row_stride, tl, use_kernel

# A program holds one row in registers: at 4,096 columns 8 warps have 16 values a thread, two 16-byte loads from x and
# two from the residual, all of them in flight before the first sum. 128 to 1,024 values a warp are within noise: 4.1 us
# for 256 x 4096 and 20.6 for 2048 x 4096 bf16 (H200, cold L2, 2026-11-24), 3.0 for 256 in a model.
VALUES_PER_WARP = 512
MAX_WARPS = 16


@jit
def scale_rows(x, inverse_rms, weight, GEMMA: tl.constexpr, DTYPE: tl.constexpr):
    """x * inverse_rms * weight with x in float32, rounded to DTYPE as the model family does it."""
    if GEMMA:
        return (x * inverse_rms * (1.0 + weight.to(tl.float32))).to(DTYPE)
    return ((x * inverse_rms).to(DTYPE).to(tl.float32) * weight.to(tl.float32)).to(DTYPE)


@jit
def _rmsnorm_kernel(
    x, residual, weight, inner_weight, out,
    stride_x, eps,
    N: tl.constexpr, BLOCK_N: tl.constexpr, GEMMA: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    n_ok = n < N
    values = tl.load(x + row * stride_x + n, mask=n_ok, other=0.0).to(tl.float32)
    # Asked for before the first sum is waited for.
    scale = tl.load(weight + n, mask=n_ok, other=0.0)
    if residual is not None:
        before = tl.load(residual + row * N + n, mask=n_ok, other=0.0).to(tl.float32)
    if inner_weight is not None:
        inner_scale = tl.load(inner_weight + n, mask=n_ok, other=0.0)
        inner_inverse_rms = tl.rsqrt(tl.sum(values * values, axis=0) / N + eps)
        values = scale_rows(values, inner_inverse_rms, inner_scale, GEMMA, dtype).to(tl.float32)
    if residual is not None:
        after = (before + values).to(dtype)
        tl.store(residual + row * N + n, after, mask=n_ok)
        values = after.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(values * values, axis=0) / N + eps)
    tl.store(out + row * N + n, scale_rows(values, inverse_rms, scale, GEMMA, dtype), mask=n_ok)


def warps_for(block_n: int) -> int:
    return min(max(block_n // VALUES_PER_WARP, 1), MAX_WARPS)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, gemma: bool, inner_weight: Tensor | None
) -> Tensor:
    rows, n = x.shape
    stride_x = row_stride("add_rmsnorm", "x", x, weight.dtype)
    if residual is not None and not (
        residual.is_contiguous() and residual.dtype == x.dtype and residual.shape == x.shape
    ):
        raise ValueError(
            f"add_rmsnorm: residual must be contiguous {x.dtype} {list(x.shape)} as x, "
            f"got {residual.dtype} {list(residual.shape)} with strides {residual.stride()}"
        )
    out = x.new_empty((rows, n))
    if rows:
        block_n = 1 << (n - 1).bit_length()
        # Fused, the inner norm's product and the residual's sum become one fma in the dtype itself, which drops the
        # rounding between them: seen in bf16 for sm_90, in one of five values.
        _rmsnorm_kernel[(rows,)](
            x, residual, weight, inner_weight, out, stride_x, eps, N=n, BLOCK_N=block_n, GEMMA=gemma,
            num_warps=warps_for(block_n), enable_fp_fusion=False,
        )  # fmt: skip
    return out


torch.library.define(
    "multilora::add_rmsnorm",
    "(Tensor x, Tensor(a!)? residual, Tensor weight, float eps, bool gemma, Tensor? inner_weight) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("multilora::add_rmsnorm", ("cpu", "cuda"), _launch)
OP = torch.ops.multilora.add_rmsnorm.default


@torch.library.register_fake("multilora::add_rmsnorm")
def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, gemma: bool, inner_weight: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


def add_rmsnorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    gemma: bool = False,
    inner_weight: Tensor | None = None,
) -> Tensor:
    """residual += x in place, rounded to its dtype; returns rmsnorm(residual), or rmsnorm(x) without a residual.

    Args:
        x: [T, N] bf16, fp16 or fp32, rows may be strided.
        residual: [T, N] contiguous, x's dtype, or None.
        weight: [N], x's dtype.
        eps: added to the mean of squares.
        gemma: multiply by 1 + weight in float32 and round once.
        inner_weight: [N]; x is normalised with it, same eps and rounding, before it is added.

    Returns: [T, N] contiguous, x's dtype. Equals transformers' LlamaRMSNorm and Gemma3RMSNorm but for the order of the
    sum of squares. The kernel runs on CUDA, the torch reference elsewhere.
    """
    shape = x.shape[1:]
    if weight.shape != shape:
        raise ValueError(f"add_rmsnorm: weight must be {list(shape)}, got {list(weight.shape)}")
    if inner_weight is not None and inner_weight.shape != shape:
        raise ValueError(f"add_rmsnorm: inner_weight must be {list(shape)}, got {list(inner_weight.shape)}")
    if use_kernel(x):
        launch = OP if is_compiling() else _launch
        return launch(x, residual, weight, eps, gemma, inner_weight)
    return add_rmsnorm_reference(x, residual, weight, eps, gemma, inner_weight)


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
    """RMSNorm over the last dimension in torch, with the model family's roundings."""
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (values * (1.0 + weight.float())).type_as(x) if gemma else weight * values.to(x.dtype)


def add_rmsnorm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    gemma: bool = False,
    inner_weight: Tensor | None = None,
) -> Tensor:
    """What add_rmsnorm computes, in torch: transformers' own operations, so their result bit for bit. Any device."""
    if inner_weight is not None:
        x = rmsnorm_reference(x, inner_weight, eps, gemma)
    if residual is not None:
        x = residual.add_(x)
    return rmsnorm_reference(x, weight, eps, gemma)
