# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from multilora_kernels import Delta
from multilora_kernels.rope import rope_write, rope_write_reference

EPS = 1e-5
PAGE_SIZE = 4
UNTOUCHED = 7.0
NORMS = {"no-norm": None, "qwen-norm": False, "gemma-norm": True}
RANKS = (1, 8, 12, 40)
ROWS = [3, -1, 0, 2, 2, -1, 1, 2, 0, -1, 3, 1, -1] * 3


@dataclass
class Setup:
    """All arguments but qkv and delta. The cache is the middle one of three in a storage; most slots are free."""

    heads: int
    kv_heads: int
    cos: torch.Tensor
    sin: torch.Tensor
    storage: torch.Tensor
    slots: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    gemma: bool

    @property
    def kv_cache(self) -> torch.Tensor:
        return self.storage[:, 1]

    @property
    def widths(self) -> tuple[int, int, int]:
        d = self.storage.shape[5]
        return self.heads * d, self.kv_heads * d, self.kv_heads * d

    def run(self, op, qkv: torch.Tensor, delta: Delta | None = None, out: torch.Tensor | None = None):
        """(q, the storage after it)."""
        storage = self.storage.clone()
        norms = (self.q_norm, self.k_norm, EPS, self.gemma)
        q = op(qkv, self.cos, self.sin, storage[:, 1], self.slots, self.heads, self.kv_heads, *norms, delta, out)
        return q, storage

    def written(self, storage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the step's tokens, [T, kv_heads, D] each; everything else must be untouched."""
        storage = storage.clone()
        pages, offsets = self.slots.long() // PAGE_SIZE, self.slots.long() % PAGE_SIZE
        k, v = (storage[pages, 1, which, offsets] for which in (0, 1))
        storage[pages, 1, :, offsets] = UNTOUCHED
        assert (storage == UNTOUCHED).all(), "slots of other tokens"
        return k, v


def make_setup(rows: int, heads: int, kv_heads: int, d: int, rotary: int, gemma: bool | None, target) -> Setup:
    generator = torch.Generator().manual_seed(rows * d)
    # Models have the same angles in both halves; here none are alike, so that no column can stand for another.
    angles = (torch.arange(rows)[:, None] * 37 % 1000) / 10000 ** (torch.arange(rotary) / rotary)
    pages = 3 * rows // PAGE_SIZE + 2
    storage = torch.full((pages, 3, 2, PAGE_SIZE, kv_heads, d), UNTOUCHED)
    slots = torch.randperm(pages * PAGE_SIZE, generator=generator)[:rows].int()
    norms = [None if gemma is None else 1 + 0.3 * torch.randn(d, generator=generator) for _ in range(2)]
    q_norm, k_norm = (norm if norm is None else norm.to(target.device, target.dtype) for norm in norms)
    cos, sin, storage = (t.to(target.device, target.dtype) for t in (angles.cos(), angles.sin(), storage))
    return Setup(heads, kv_heads, cos, sin, storage, slots.to(target.device), q_norm, k_norm, bool(gemma))


def make_qkv(setup: Setup) -> torch.Tensor:
    """Columns of a wider buffer with NaN on both sides."""
    n = sum(setup.widths)
    wide = torch.full((len(setup.cos), n + 27), torch.nan, dtype=setup.cos.dtype, device=setup.cos.device)
    wide[:, 16 : 16 + n] = torch.randn(len(setup.cos), n, generator=torch.Generator().manual_seed(n))
    return wide[:, 16 : 16 + n]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """For comparisons that tell -0.0 from 0.0."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def check_against_fp64(setup: Setup, q, storage, qkv: torch.Tensor, qkv_error: torch.Tensor) -> None:
    """Each rounding of the model's arithmetic, carried through to the end, from qkv and its own error in float64.

    A rounding is at most half an eps; products of errors are covered by counting whole ones.
    """
    fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(q.dtype).eps
    tiny = torch.finfo(q.dtype).tiny * rounding
    d, rotary = q.shape[2], setup.cos.shape[1]
    values, errors = (part.double().unflatten(1, (-1, d)) for part in (qkv, qkv_error))
    heads = [setup.heads, setup.kv_heads, setup.kv_heads]
    parts = list(zip(values.split(heads, dim=1), errors.split(heads, dim=1), strict=True))
    for i, weight in enumerate((setup.q_norm, setup.k_norm)):
        value, error = parts[i]
        if weight is not None:
            scale = 1 + weight.double() if setup.gemma else weight.double()
            squares = value.square().sum(-1, keepdim=True)
            inverse_rms = torch.rsqrt(squares / d + EPS)
            relative = (value.abs() * error).sum(-1, keepdim=True) / squares.clamp_min(d * EPS) + (d / 2 + 6) * fp32
            error = (scale * inverse_rms).abs() * (error + value.abs() * (relative + 2 * rounding)) + tiny
            value = value * inverse_rms * scale
        cos, sin = setup.cos.double()[:, None], setup.sin.double()[:, None]
        turning, turning_error = value[..., :rotary], error[..., :rotary]
        (low, high), (low_error, high_error) = turning.chunk(2, dim=-1), turning_error.chunk(2, dim=-1)
        products = turning * cos, torch.cat([-high, low], dim=-1) * sin
        carried = turning_error * cos.abs() + torch.cat([high_error, low_error], dim=-1) * sin.abs()
        rounded = 1.5 * rounding * (products[0].abs() + products[1].abs()) + 3 * tiny
        value = torch.cat([products[0] + products[1], value[..., rotary:]], dim=-1)
        error = torch.cat([carried + rounded, error[..., rotary:]], dim=-1)
        parts[i] = value, error
    for actual, (value, error) in zip((q, *setup.written(storage)), parts, strict=True):
        assert actual.shape == value.shape
        assert ((actual.double() - value).abs() <= error).all()


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


def lora_in_fp64(case, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """(y + LoRA, error of its sum over ranks in float32 and of its one rounding), both [T, N]."""
    fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(case.y.dtype).eps
    total, error = case.y.double(), torch.zeros_like(case.y, dtype=torch.float64)
    for token in case.with_adapter():
        h = case.h_of(delta.h, token, delta.segments.plan).double()
        b_slices = case.b_of(int(case.rows[token])).double().split(case.widths, dim=1)
        magnitude = torch.cat([own.abs() @ b.abs() for own, b in zip(h, b_slices, strict=True)]) + total[token].abs()
        total[token] += torch.cat([own @ b for own, b in zip(h, b_slices, strict=True)])
        error[token] = (h.shape[1] + 2) * fp32 * magnitude + rounding * total[token].abs()
    return total, error


@pytest.mark.parametrize(
    ("d", "rotary", "norm", "bordered", "block_m"),
    [  # every two values of different columns that the kernel can tell apart meet
        (8, 8, "qwen-norm", True, 16),
        (8, 8, "gemma-norm", False, 16),
        (16, 16, "no-norm", False, 64),
        (64, 64, "gemma-norm", True, 64),
        (96, 72, "no-norm", True, 16),
        (96, 72, "qwen-norm", False, 64),
    ],
)
def test_kernel_with_delta(target, make_case, d, rotary, norm, bordered, block_m):
    setup = make_setup(len(ROWS), 2, 1, d, rotary, NORMS[norm], target)
    case = make_case(ROWS, target, ranks=RANKS, widths=setup.widths, bordered=bordered, k=12)
    case.y[:, ::5] *= -0.0
    delta, before = case.delta(case.segments(block_m)), case.y.clone()
    q, storage = setup.run(rope_write, case.y, delta)
    assert torch.equal(case.y, before)
    plain_q, plain_storage = setup.run(rope_write, case.y)
    check_against_fp64(setup, q, storage, *lora_in_fp64(case, delta))
    without = [token for token, slot in enumerate(ROWS) if slot < 0]
    for fused, plain in zip((q, *setup.written(storage)), (plain_q, *setup.written(plain_storage)), strict=True):
        assert torch.equal(bits(fused)[without], bits(plain)[without])


@pytest.mark.parametrize("op", [rope_write, rope_write_reference])
def test_any_batch_with_delta(batch, target, make_case, op):
    rows, ranks = batch
    setup = make_setup(len(rows), 3, 2, 16, 12, False, target)
    case = make_case(rows, target, ranks=ranks, widths=setup.widths, bordered=True)
    delta = case.delta(case.segments(16))
    q, storage = setup.run(op, case.y, delta)
    check_against_fp64(setup, q, storage, *lora_in_fp64(case, delta))


@pytest.mark.parametrize("norm", NORMS)
def test_reference_with_delta(reference_target, make_case, norm):
    setup = make_setup(len(ROWS), 3, 1, 16, 12, NORMS[norm], reference_target)
    case = make_case(ROWS, reference_target, ranks=RANKS, widths=setup.widths)
    delta, before = case.delta(case.segments(16)), case.y.clone()
    q, storage = setup.run(rope_write_reference, case.y, delta)
    check_against_fp64(setup, q, storage, *lora_in_fp64(case, delta))
    assert torch.equal(case.y, before)


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


@pytest.mark.parametrize("op", [rope_write, rope_write_reference])
@pytest.mark.parametrize("with_delta", [False, True])
def test_queries_go_into_out(target, make_case, op, with_delta):
    rows = ROWS[:7]
    setup = make_setup(len(rows), 3, 1, 16, 12, None, target)
    case = make_case(rows, target, ranks=RANKS, widths=setup.widths)
    delta = case.delta(case.segments(16)) if with_delta else None
    buffer = torch.full((len(rows) + 2, 3, 16), UNTOUCHED).to(case.y)
    q, storage = setup.run(op, case.y, delta, buffer[1:-1])
    assert q.data_ptr() == buffer[1:].data_ptr()
    assert (buffer[[0, -1]] == UNTOUCHED).all()
    expected_q, expected_storage = setup.run(op, case.y, delta)
    assert torch.equal(buffer[1:-1], expected_q)
    assert torch.equal(storage, expected_storage)


def test_empty_tiles_write_nothing(target, make_case):
    setup = make_setup(len(ROWS), 3, 1, 16, 16, None, target)
    case = make_case(ROWS, target, ranks=RANKS, widths=setup.widths)
    segments = case.segments(16)
    delta = case.delta(segments)
    padded = segments.plan.pad_to(segments.plan.num_tiles + 3).to(target.device)
    # Token 0 is what an empty tile's record and masked rows point at.
    for expected, actual in zip(
        setup.run(rope_write, case.y, delta), setup.run(rope_write, case.y, Delta(delta.h, case.b, padded)), strict=True
    ):
        assert torch.equal(actual, expected)


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
    torch.library.opcheck(op, (*common, *norms, h, b, segments.order, segments.tiles, 16, 16))


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
