# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from multilora_kernels import Delta
from multilora_kernels.activation import KINDS, gated_activation, gated_activation_reference

HF_NAMES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
RANKS = (1, 8, 12, 40)
ROWS = [3, -1, 0, 2, 2, -1, 1, 2, 0, -1, 3, 1, -1] * 3


def strided(values: torch.Tensor) -> torch.Tensor:
    """The same values as columns of a wider buffer, NaN on both sides."""
    rows, columns = values.shape
    wide = torch.full((rows, columns + 23), torch.nan, dtype=values.dtype, device=values.device)
    wide[:, 8 : 8 + columns] = values
    return wide[:, 8 : 8 + columns]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """For comparisons that tell -0.0 from 0.0."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def sum_in_fp64(case, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """(y + LoRA, sum of magnitudes), both [T, N] in float64."""
    total, magnitude = case.y.double(), case.y.double().abs()
    for token in case.with_adapter():
        h = case.h_of(delta.h, token, delta.segments.plan).double()
        b_slices = case.b_of(int(case.rows[token])).double().split(case.widths, dim=1)
        total[token] += torch.cat([own @ b for own, b in zip(h, b_slices, strict=True)])
        magnitude[token] += torch.cat([own.abs() @ b.abs() for own, b in zip(h, b_slices, strict=True)])
    return total, magnitude


def check_against_fp64(actual: torch.Tensor, gate_up: torch.Tensor, magnitude: torch.Tensor, kind: str, rank: int):
    """Roundings of gate, up, act(gate) and the product; in float32 the sums over ranks and a few ulps of exp.

    Neither activation is steeper than 1.13; a relative error of exp is at most the same of act(gate) relative to gate.
    """
    fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(actual.dtype).eps
    gate, up = gate_up.chunk(2, dim=1)
    gate_error, up_error = (
        (rank + 2) * fp32 * size + rounding * value.abs()
        for value, size in zip((gate, up), magnitude.chunk(2, dim=1), strict=True)
    )
    activated = ACT2FN[HF_NAMES[kind]](gate)
    activated_error = 1.13 * gate_error + 8 * fp32 * gate.abs() + rounding * activated.abs()
    error = (actual.double() - activated * up).abs()
    bound = up.abs() * activated_error + (activated.abs() + activated_error) * up_error
    bound += rounding * (activated * up).abs() + torch.finfo(actual.dtype).tiny * rounding * (1 + up.abs())
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
def test_reference_is_the_models_own_arithmetic(model, dtype):
    import transformers
    from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    config_class, mlp_class = {
        "llama": (transformers.LlamaConfig, LlamaMLP),
        "qwen3": (transformers.Qwen3Config, Qwen3MLP),
        "gemma2": (transformers.Gemma2Config, Gemma2MLP),
        "gemma3": (transformers.Gemma3TextConfig, Gemma3MLP),
        "phi3": (transformers.Phi3Config, Phi3MLP),
    }[model]
    torch.manual_seed(0)
    # Rows of whole vectors: in the odd elements at the end torch's exp differs by an ulp.
    mlp = mlp_class(config_class(hidden_size=32, intermediate_size=64)).to(dtype)
    mlp.down_proj = nn.Identity()
    x = 20 * torch.randn(17, 32, dtype=dtype)
    gate_up = mlp.gate_up_proj(x) if model == "phi3" else torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=1)
    kind = "gelu_tanh" if model.startswith("gemma") else "silu"
    out = gated_activation_reference(strided(gate_up), kind)
    assert torch.equal(out, mlp(x))
    assert out.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 1024), (17, 1030), (65, 2)])
def test_kernel_without_delta(target, rows, width, kind):
    values = 4 * torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(rows))
    values[0, 0], values[-1, 0], values[-1, 1] = -300.0, 300.0, 0.0
    gate_up = strided(values.to(target.device, target.dtype))
    out = gated_activation(gate_up, kind)
    assert out.shape == (rows, width)
    assert out.is_contiguous()
    check_against_fp64(out, gate_up.double(), gate_up.double().abs(), kind, rank=0)


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_rounds_where_the_reference_does(target, kind):
    if target.dtype == torch.float32:
        pytest.skip("no rounding between the steps")
    gate_up = torch.randn(9, 2600, generator=torch.Generator().manual_seed(0)).to(target.device, target.dtype)
    actual, expected = gated_activation(gate_up, kind), gated_activation_reference(gate_up, kind)
    # Another exp in float32 carries one value in a thousand over the border of a rounding.
    assert (actual != expected).double().mean() < 0.01


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(
    ("kind", "width", "bordered"), [("silu", 128, True), ("gelu_tanh", 150, False), ("silu", 7, True)]
)
def test_kernel_with_delta(target, make_case, block_m, kind, width, bordered):
    case = make_case(ROWS, target, ranks=RANKS, widths=(width, width), bordered=bordered, k=12)
    case.y[:, ::5] *= -0.0
    delta, before = case.delta(case.segments(block_m)), case.y.clone()
    out = gated_activation(strided(case.y), kind, delta)
    check_against_fp64(out, *sum_in_fp64(case, delta), kind, max(RANKS))
    without = [token for token, slot in enumerate(ROWS) if slot < 0]
    assert torch.equal(bits(out)[without], bits(gated_activation(case.y, kind))[without])
    assert torch.equal(case.y, before)


def test_kernel_with_delta_in_any_batch(batch, target, make_case):
    rows, ranks = batch
    case = make_case(rows, target, ranks=ranks, widths=(33, 33), bordered=True)
    delta = case.delta(case.segments(16))
    out = gated_activation(case.y, "silu", delta)
    assert out.shape == (len(rows), 33)
    check_against_fp64(out, *sum_in_fp64(case, delta), "silu", max(ranks))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_with_delta(batch, reference_target, make_case, kind):
    rows, ranks = batch
    case = make_case(rows, reference_target, ranks=ranks, widths=(33, 33), bordered=True)
    delta, before = case.delta(case.segments(16)), case.y.clone()
    out = gated_activation_reference(case.y, kind, delta)
    check_against_fp64(out, *sum_in_fp64(case, delta), kind, max(ranks))
    assert torch.equal(case.y, before)


def test_empty_tiles_do_nothing(target, make_case):
    case = make_case(ROWS, target, ranks=RANKS, widths=(33, 33))
    segments = case.segments(16)
    delta = case.delta(segments)
    padded = segments.plan.pad_to(segments.plan.num_tiles + 3).to(target.device)
    out = gated_activation(case.y, "silu", Delta(delta.h, delta.b, padded))
    assert torch.equal(out, gated_activation(case.y, "silu", delta))


def test_operator_passes_opcheck(one_target, make_case):
    case = make_case(ROWS[:13], one_target, ranks=RANKS, widths=(33, 33))
    delta, op = case.delta(case.segments(16)), torch.ops.multilora.gated_activation.default
    torch.library.opcheck(op, (case.y, "silu", None, None, None, None, 1, 1))
    # Without NaN beside the own columns, which opcheck takes for a difference between its runs.
    h, segments = delta.h.nan_to_num(), delta.segments
    torch.library.opcheck(op, (case.y, "silu", h, case.b.nan_to_num(), segments.rows, segments.tiles, 16, 16))


@pytest.mark.parametrize("op", [gated_activation])
def test_wrong_arguments_are_refused(one_target, make_case, op):
    case = make_case([0, 1], one_target, ranks=(3, 9), widths=(6, 6))
    delta = case.delta(case.segments(16))
    with pytest.raises(ValueError, match=r"kind must be one of \('silu', 'gelu_tanh'\), got 'relu'"):
        op(case.y, "relu")
    with pytest.raises(ValueError, match="even number of columns, got 11"):
        op(case.y[:, :11], "silu")
    with pytest.raises(ValueError, match="gate_up is 2 x 10, but delta has 12 columns in b"):
        op(case.y[:, :10], "silu", delta)
    with pytest.raises(ValueError, match=r"gate_up is 1 x 12, but .* 2 rows in h and a plan for 2 tokens"):
        op(case.y[:1], "silu", delta)
    with pytest.raises(ValueError, match="b must have dtype"):
        op(case.y, "silu", Delta(delta.h, case.b.double(), delta.segments))
    with pytest.raises(ValueError, match="gate_up must be dense in its last dimension"):
        op(case.y.T.contiguous().T, "silu")
