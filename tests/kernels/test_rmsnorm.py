# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from multilora_kernels._triton import INTERPRETED, triton
from multilora_kernels.rmsnorm import _rmsnorm_kernel, add_rmsnorm, add_rmsnorm_reference, warps_for

EPS = 1e-5
FORMS = {"llama": (False, False), "gemma": (True, False), "llama-inner": (False, True), "gemma-inner": (True, True)}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[bool, bool]:
    """(gemma, with a norm of x before it is added)."""
    return FORMS[request.param]


def make(rows: int, n: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x in strided rows with NaN on both sides, residual, weight, inner weight. Rows differ much in size."""
    generator = torch.Generator().manual_seed(rows * n)
    scale = torch.logspace(-3, 2, rows)[:, None]
    x, residual = (torch.randn(2, rows, n, generator=generator) * scale).to(dtype)
    wide = torch.full((rows, n + 19), torch.nan, dtype=dtype)
    wide[:, 8 : 8 + n] = x
    weight, inner_weight = (1 + 0.3 * torch.randn(2, n, generator=generator)).to(dtype)
    return tuple(tensor.to(device) for tensor in (wide, residual, weight, inner_weight))


def columns(wide: torch.Tensor) -> torch.Tensor:
    return wide[:, 8 : wide.shape[1] - 11]


def norm_in_fp64(x: torch.Tensor, weight: torch.Tensor, gemma: bool) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1 + weight if gemma else weight)


def check_norm(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gemma: bool) -> None:
    """Two roundings to the dtype (Gemma: one), and in float32 half the error of the sum, rsqrt and two products."""
    fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(actual.dtype).eps
    expected = norm_in_fp64(x, weight, gemma)
    relative = (x.shape[1] / 2 + 6) * fp32 + (1 if gemma else 2) * rounding
    smallest = torch.finfo(actual.dtype).tiny * rounding * (1 + weight.double().abs())
    assert ((actual.double() - expected).abs() <= relative * expected.abs() + smallest).all()


SHAPES = [(1, 1), (3, 37), (17, 256), (9, 100), (2, 1027)]


@pytest.mark.parametrize(("rows", "n"), SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_kernel(target, form, rows, n, with_residual):
    gemma, inner = form
    wide, residual, weight, inner_weight = make(rows, n, target.device, target.dtype)
    before = wide.clone()
    after = residual.clone() if with_residual else None
    out = add_rmsnorm(columns(wide), after, weight, EPS, gemma, inner_weight if inner else None)
    assert out.is_contiguous()
    assert out.dtype == target.dtype
    torch.testing.assert_close(wide, before, rtol=0, atol=0, equal_nan=True)

    added = columns(wide)
    if inner:
        # Its own rounding is one ulp off at times, which the next norm would carry on: checked through the residual.
        added = add_rmsnorm(columns(wide), None, inner_weight, EPS, gemma)
        check_norm(added, columns(wide), inner_weight, gemma)
    if after is not None:
        assert torch.equal(after, residual + added)
        added = after
    check_norm(out, added, weight, gemma)


def test_kernel_rounds_where_the_reference_does(target, form):
    if target.dtype == torch.float32:
        pytest.skip("no rounding between the steps")
    gemma, inner = form
    wide, residual, weight, inner_weight = make(9, 1300, target.device, target.dtype)
    results = []
    for op in (add_rmsnorm, add_rmsnorm_reference):
        after = residual.clone()
        out = op(columns(wide), after, weight, EPS, gemma, inner_weight if inner else None)
        results.append((out, after))
    for actual, expected in zip(*results, strict=True):
        # Sums in float32 in another order carry one value in a thousand over the border of a rounding.
        assert (actual != expected).double().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, Qwen3RMSNorm, Phi3RMSNorm, Gemma2RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_inner", [False, True])
def test_reference_is_the_models_own_arithmetic(norm_class, dtype, with_residual, with_inner):
    wide, residual, weight, inner_weight = make(17, 101, "cpu", dtype)
    norm, inner_norm = norm_class(101, EPS).to(dtype), norm_class(101, EPS).to(dtype)
    norm.weight.data, inner_norm.weight.data = weight, inner_weight
    x = columns(wide)
    if with_inner:
        x = inner_norm(x)
    expected_after = residual + x
    expected = norm(expected_after if with_residual else x)

    after, before = residual.clone() if with_residual else None, wide.clone()
    gemma = norm_class in (Gemma2RMSNorm, Gemma3RMSNorm)
    out = add_rmsnorm_reference(columns(wide), after, weight, EPS, gemma, inner_weight if with_inner else None)
    assert torch.equal(out, expected)
    assert after is None or torch.equal(after, expected_after)
    torch.testing.assert_close(wide, before, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_in_its_row(target):
    wide, residual, weight, _ = make(5, 40, target.device, target.dtype)
    clean = add_rmsnorm(columns(wide), residual.clone(), weight, EPS)
    columns(wide)[2, 7] = torch.nan
    broken = add_rmsnorm(columns(wide), residual.clone(), weight, EPS)
    assert broken[2].isnan().all()
    assert torch.equal(broken[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_no_rows(target):
    x = torch.empty(0, 12, dtype=target.dtype, device=target.device)
    assert add_rmsnorm(x, x.clone(), x.new_ones(12), EPS).shape == (0, 12)


@pytest.mark.parametrize(("gemma", "inner"), [(False, False), (True, True)])
def test_operator_passes_opcheck(one_target, gemma, inner):
    wide, residual, weight, inner_weight = make(3, 24, one_target.device, one_target.dtype)
    op = torch.ops.multilora.add_rmsnorm.default
    for after in (residual, None):
        arguments = (columns(wide), after, weight, EPS, gemma, inner_weight if inner else None)
        torch.library.opcheck(op, arguments)


def test_wrong_tensors_are_refused(one_target):
    wide, residual, weight, _ = make(4, 24, one_target.device, one_target.dtype)
    x = columns(wide)
    with pytest.raises(ValueError, match="x must have dtype"):
        add_rmsnorm(x, None, weight.double(), EPS)
    with pytest.raises(ValueError, match="x must be dense in its last dimension"):
        add_rmsnorm(residual.T, None, weight[:4], EPS)
    for wrong in (residual[:3], residual.double(), residual.T.contiguous().T):
        with pytest.raises(ValueError, match="residual must be contiguous"):
            add_rmsnorm(x, wrong, weight, EPS)
    with pytest.raises(ValueError, match=r"weight must be \[24\], got \[23\]"):
        add_rmsnorm(x, None, weight[:23], EPS)
    with pytest.raises(ValueError, match=r"inner_weight must be \[24\], got \[23\]"):
        add_rmsnorm(x, None, weight, EPS, inner_weight=weight[:23])


@pytest.mark.skipif(triton is None or INTERPRETED, reason="needs Triton-lang's compiler")
@pytest.mark.parametrize(("n", "inner"), [(4096, False), (3584, True)])
def test_compiles_to_wide_loads_and_stores(n, inner):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    block_n = triton.next_power_of_2(n)
    pointers = ["x", "residual", "weight", "out"] + ["inner_weight"] * inner
    types = dict.fromkeys(pointers, "*bf16") | {"stride_x": "i32", "eps": "fp32"}
    constants = {"N": n, "BLOCK_N": block_n, "GEMMA": inner}
    names = _rmsnorm_kernel.arg_names
    source = ASTSource(
        fn=_rmsnorm_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(i,): constants.get(name) for i, name in enumerate(names) if name not in types},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types and name != "eps"},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps_for(block_n)})
    ptx = compiled.asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == ptx.count("ld.global") > 0
    assert ptx.count("st.global.v4.b32") == ptx.count("st.global") > 0
