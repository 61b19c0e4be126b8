# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from multilora_kernels import Delta
from multilora_kernels.rope import rope_write, rope_write_reference
from rope_cases import EPS, NORMS, UNTOUCHED, check_against_fp64, make_qkv, make_setup

SHAPES = [  # rows, heads, KV heads, D, rotary width
    (1, 4, 2, 16, 16),
    (3, 3, 1, 8, 8),
    (5, 9, 2, 96, 96),
    (9, 2, 2, 64, 32),
    (3, 9, 3, 128, 96),
    (5, 5, 1, 256, 256),
    (2, 2, 1, 30, 26),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "d", "rotary"), SHAPES)
def test_kernel_without_delta(target, rows, heads, kv_heads, d, rotary, norm):
    setup = make_setup(rows, heads, kv_heads, d, rotary, NORMS[norm], target)
    qkv = make_qkv(setup)
    before = qkv.clone()
    q, storage = setup.run(rope_write, qkv)
    assert q.is_contiguous()
    assert torch.equal(qkv, before)
    check_against_fp64(setup, q, storage, qkv, torch.zeros_like(qkv))


@pytest.mark.parametrize("norm", NORMS)
def test_kernel_rounds_where_the_reference_does(target, norm):
    if target.dtype == torch.float32:
        pytest.skip("no rounding between the steps")
    setup = make_setup(9, 9, 2, 96, 72, NORMS[norm], target)
    qkv = make_qkv(setup)
    (q, storage), (expected_q, expected_storage) = setup.run(rope_write, qkv), setup.run(rope_write_reference, qkv)
    # Sums in another order carry one value in a thousand over the border of a rounding.
    written = zip(setup.written(storage), setup.written(expected_storage), strict=True)
    for actual, expected in ((q, expected_q), *written):
        assert (actual != expected).double().mean() < (0.01 if setup.q_norm is not None else 1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("d", "rotary"), [(16, 16), (96, 96), (96, 72)])
def test_reference_is_the_models_own_arithmetic(reference_target, norm, d, rotary):
    setup = make_setup(17, 6, 2, d, rotary, NORMS[norm], reference_target)
    qkv = make_qkv(setup)
    q, k, v = qkv[None].unflatten(2, (-1, d)).split([6, 2, 2], dim=2)
    if setup.q_norm is not None:
        for_q, for_k = ((Gemma3RMSNorm if setup.gemma else Qwen3RMSNorm)(d, EPS) for _ in range(2))
        for_q.weight.data, for_k.weight.data = setup.q_norm, setup.k_norm
        q, k = for_q(q), for_k(k)
    apply = apply_rotary_pos_emb if rotary == d else apply_partial_rotary_pos_emb
    q, k = apply(q.transpose(1, 2), k.transpose(1, 2), setup.cos[None], setup.sin[None])

    actual, storage = setup.run(rope_write_reference, qkv)
    assert actual.is_contiguous()
    expected = q.transpose(1, 2)[0], k.transpose(1, 2)[0], v[0]
    for own, models in zip((actual, *setup.written(storage)), expected, strict=True):
        assert torch.equal(own, models)


def test_operator_passes_opcheck(one_target, make_case):
    setup = make_setup(2, 2, 1, 16, 12, False, one_target)
    case = make_case([1, -1], one_target, ranks=(3, 9), widths=setup.widths)
    delta, op = case.delta(case.segments(16)), torch.ops.multilora.rope_write.default
    q = case.y.new_empty(2, setup.heads, 16)
    common = (q, case.y, setup.cos, setup.sin, setup.kv_cache, setup.slots)
    torch.library.opcheck(op, (*common, None, None, 0.0, False, None, None, None, None, 1, 1))
    # Without NaN beside the own columns, which opcheck takes for a difference between its runs.
    h, b, segments = delta.h.nan_to_num(), case.b.nan_to_num(), delta.segments
    norms = (setup.q_norm, setup.k_norm, EPS, True)
    torch.library.opcheck(op, (*common, *norms, h, b, segments.rows, segments.tiles, 16, 16))


def test_wrong_tensors_are_refused(one_target, make_case):
    setup = make_setup(2, 3, 1, 16, 12, False, one_target)
    case = make_case([0, 1], one_target, ranks=(3, 9), widths=setup.widths)
    delta = case.delta(case.segments(16))
    good = {
        "qkv": case.y, "cos": setup.cos, "sin": setup.sin, "kv_cache": setup.kv_cache, "slots": setup.slots,
        "num_heads": 3, "num_kv_heads": 1, "q_norm": setup.q_norm, "k_norm": setup.k_norm, "delta": delta,
    }  # fmt: skip
    cache = setup.kv_cache
    for wrong, message in [
        ({"num_heads": 4}, r"qkv must have \(num_heads \+ 2 \* num_kv_heads\) \* D = 6 \* 16 columns, got 80"),
        ({"num_kv_heads": 2}, r"kv_cache must be \[pages, 2, page_size, 2, D\]"),
        (
            {"kv_cache": cache.transpose(2, 3)},
            r"kv_cache must be \[pages, 2, page_size, 1, D\] and dense within a page",
        ),
        ({"kv_cache": cache.double()}, "kv_cache, cos and sin must have dtype"),
        ({"cos": setup.cos[:1]}, "cos and sin must be contiguous and of one shape with 2 rows"),
        ({"cos": setup.cos[:, :10]}, "cos and sin must be contiguous"),
        ({"cos": setup.cos[:, :11].clone(), "sin": setup.sin[:, :11].clone()}, "the rotary width must be even"),
        ({"slots": setup.slots[:1]}, r"slots must be \[2\], got \[1\]"),
        ({"k_norm": None}, "q_norm and k_norm must be given both or not at all"),
        ({"q_norm": setup.q_norm[:15]}, r"q_norm and k_norm must be \[16\]"),
        ({"delta": Delta(delta.h[:1], case.b, delta.segments)}, "1 rows in h and a plan for 2 tokens"),
        ({"delta": Delta(delta.h, case.b[:, :79], delta.segments)}, "qkv is 2 x 80, but delta has 79 columns in b"),
        (
            {"out": case.y.new_empty(2, 16, 3).mT},
            r"out must be contiguous \S+ \[2, 3, 16\], got .* strides \(48, 1, 3\)",
        ),
        ({"out": case.y.new_empty(2, 3, 15)}, r"out must be contiguous \S+ \[2, 3, 16\], got \S+ \[2, 3, 15\]"),
        ({"out": torch.empty(2, 3, 16, dtype=torch.float64)}, r"out must be contiguous .* got torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            rope_write(**{**good, **wrong})
    assert (cache == UNTOUCHED).all()
