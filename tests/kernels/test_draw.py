# SPDX-License-Identifier: Apache-2.0
"""Drawing and truncating: the same random bits everywhere, and kernels that choose what the references choose."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from multilora_kernels._triton import INTERPRETED, jit, tl, triton
from multilora_kernels.draw import (
    LEAST_PARTS,
    _draw_kernel,
    _pick_kernel,
    draw,
    draw_reference,
    gumbel_reference,
    philox_words,
    random_bits,
)
from multilora_kernels.truncate import _truncate_kernel, truncate, truncate_reference

SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x1234567890ABCDEF]
INDICES = [0, 1, 7, 100_000, 2**31 - 1, 2, 3]
VOCAB = 9001
"""Neither a multiple of four nor of a block, and more than two blocks."""


@jit
def _words_kernel(seed, index, out, GROUPS: tl.constexpr):
    row, group = tl.program_id(0), tl.arange(0, GROUPS)
    words = philox_words(tl.load(seed + row), tl.load(index + row), group.to(tl.uint32))
    at = out + (row * GROUPS + group) * 4
    tl.store(at, words[0].to(tl.int64))
    tl.store(at + 1, words[1].to(tl.int64))
    tl.store(at + 2, words[2].to(tl.int64))
    tl.store(at + 3, words[3].to(tl.int64))


def int64(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rows(target) -> dict[str, torch.Tensor]:
    """Seven rows of ugly parameters; the first is greedy."""
    strided = torch.randn(7, VOCAB + 13, generator=torch.Generator().manual_seed(5))[:, :VOCAB] * 3
    case = {
        "logits": strided.to(target.dtype),
        "temperature": torch.tensor([0.0, 1.0, 0.5, 2.0, 1e-3, 0.7, 100.0]),
        "seed": int64(SEEDS),
        "index": int32(INDICES),
    }
    return {name: tensor.to(target.device) for name, tensor in case.items()}


TRUNCATIONS = {
    "top_k": ([5, 1, 50, 7, VOCAB, 2 * VOCAB, 4500], [1.0] * 7, [0.0] * 7),
    "top_p": ([0] * 7, [0.5, 1e-6, 0.9, 0.99, 0.3, 0.7, 0.5], [0.0] * 7),
    "min_p": ([0] * 7, [1.0] * 7, [0.5, 1.0, 0.01, 0.2, 0.5, 0.03, 0.9]),
    "all": ([5, 0, 50, 7, 1, 0, 300], [0.5, 0.9, 0.7, 1.0, 0.99, 0.3, 0.6], [0.0, 0.0, 0.0, 0.1, 0.0, 0.2, 0.97]),
}


def truncation(name: str, target) -> tuple[torch.Tensor, ...]:
    top_k, top_p, min_p = TRUNCATIONS[name]
    return tuple(t.to(target.device) for t in (int32(top_k), torch.tensor(top_p), torch.tensor(min_p)))


def test_random_bits_are_philox():
    # The known answer for a counter and a key of zeros, from the authors' Random123 library (kat_vectors).
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert random_bits(int64([0]), int32([0]), 4).tolist() == [known]


def test_bits_of_the_kernel_and_of_the_reference_are_equal(target):
    groups = 256
    seed, index = int64(SEEDS).to(target.device), int32(INDICES).to(target.device)
    out = torch.empty(len(SEEDS), groups * 4, dtype=torch.int64, device=target.device)
    _words_kernel[(len(SEEDS),)](seed, index, out, GROUPS=groups)
    assert torch.equal(out, random_bits(seed, index, groups * 4))
    assert len(out.unique()) > 0.999 * out.numel()


def test_noise_is_gumbels():
    bits = random_bits(int64(list(range(100))), int32([0] * 100), 10_000)
    noise = gumbel_reference(bits).double()
    n = noise.numel()
    # mean: Euler's constant; variance: pi^2 / 6; the standard error of a sample variance is sqrt((kurtosis - 1) / n)
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(noise.var() / (math.pi**2 / 6) - 1) < 5 * math.sqrt((5.4 - 1) / n)
    extremes = gumbel_reference(torch.tensor([0, 1, 2**26, 2**32 - 1]))
    assert extremes.isfinite().all()
    assert (extremes.diff() < 0).all()


def test_the_kernel_draws_what_the_reference_draws(target):
    case = rows(target)
    drawn = draw(**case)
    assert drawn.dtype == torch.int32
    assert torch.equal(drawn, draw_reference(**case))
    assert drawn[0] == case["logits"][0].argmax()
    assert torch.equal(draw(**{name: t[3:4] for name, t in case.items()}), drawn[3:4]), "alone or in company"


@pytest.mark.parametrize("name", TRUNCATIONS)
@pytest.mark.parametrize("step", [None, 0.5], ids=["smooth", "ties"])
def test_the_kernel_keeps_what_the_reference_keeps(target, name, step):
    case = rows(target)
    if step:
        if target.dtype == torch.float16:
            pytest.skip("has ties by itself")
        case["logits"] = (case["logits"] / step).round() * step
    limits = truncation(name, target)
    kept = truncate(case["logits"], case["temperature"], *limits)
    expected = truncate_reference(case["logits"], case["temperature"], *limits)
    sizes = [kept_tokens(case["logits"], *k).sum(1) for k in (kept, expected)]
    # A mass that is p but for rounding ends one token sooner or later; counts and ratios have no such doubt.
    assert (sizes[0] - sizes[1]).abs().max() <= (name in ("top_p", "all"))
    assert torch.equal(draw(**case, kept=kept), draw_reference(**case, kept=kept))


P = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.0, -1.0]).softmax(-1).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "expected"),
    [
        (1, 1.0, 0.0, [0]),
        (3, 1.0, 0.0, [0, 1, 2]),
        (4, 1.0, 0.0, [0, 1, 2, 3]),
        (6, 1.0, 0.0, [0, 1, 2, 3, 4, 5]),
        (0, 1e-9, 0.0, [0]),
        (0, P[0] - 1e-3, 0.0, [0]),
        (0, P[0] + 1e-3, 0.0, [0, 1]),
        (0, P[0] + P[1] + 1e-3, 0.0, [0, 1, 2]),
        (0, P[0] + P[1] + P[2] - 1e-3, 0.0, [0, 1, 2]),
        (0, P[0] + P[1] + P[2] + 1e-3, 0.0, [0, 1, 2, 3]),
        (3, (P[0] + P[1] + 1e-3) / sum(P[:3]), 0.0, [0, 1, 2]),
        (3, (P[0] + P[1] - 1e-3) / sum(P[:3]), 0.0, [0, 1]),
        (3, 0.999, 0.0, [0, 1, 2]),
        (0, 1.0, 1.0, [0]),
        (0, 1.0, math.exp(-1.01), [0, 1, 2, 3]),
        (3, 1.0, math.exp(-1.01), [0, 1, 2]),
        (3, 1.0, math.exp(-0.9), [0, 1]),
        (0, P[0] + 1e-3, math.exp(-0.4), [0]),
    ],
)
def test_what_stays_by_definition(target, top_k, top_p, min_p, expected):
    logits = torch.tensor([[2.0, 1.5, 1.0, 1.0, 0.0, -1.0]] * 2, dtype=target.dtype, device=target.device)
    logits[1] *= 2  # and the same distribution by twice the temperature
    temperature = torch.tensor([1.0, 2.0], device=target.device)
    limits = [torch.tensor([v, v], device=target.device) for v in (top_k, top_p, min_p)]
    limits[0] = limits[0].int()
    for kept in (truncate(logits, temperature, *limits), truncate_reference(logits, temperature, *limits)):
        assert [row.nonzero()[:, 0].tolist() for row in kept_tokens(logits, *kept)] == [expected] * 2


def kept_tokens(logits: torch.Tensor, floor: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    token = torch.arange(logits.shape[1], device=logits.device)
    return (logits > floor[:, None]) | ((logits == floor[:, None]) & (token <= last[:, None]))


def test_rows_that_ask_for_nothing_and_greedy_rows_keep_everything(target):
    logits = torch.zeros(2, 300, dtype=target.dtype, device=target.device)
    nothing = [torch.tensor(v, device=target.device) for v in ([0.0, 1.0], [5, 0], [0.5, 1.0], [0.0, 0.0])]
    nothing[1] = nothing[1].int()
    floor, _ = truncate(logits, *nothing)
    assert floor.tolist() == [-torch.inf] * 2


def test_top_k_counts_to_k_through_infinities(target):
    logits = torch.full((1, 300), -torch.inf, dtype=target.dtype, device=target.device)
    logits[0, [250, 7, 100]] = torch.tensor([1.0, 2.0, 1.0], dtype=target.dtype, device=target.device)
    one = torch.ones(1, device=target.device)
    for k, expected in ((1, (2.0, 7)), (2, (1.0, 100)), (3, (1.0, 250))):
        floor, last = truncate(logits, one, k * one.int(), one, 0 * one)
        assert (floor.item(), last.clamp(max=250).item()) == expected


def test_equal_logits_go_to_the_lowest_id_and_nan_to_nobody(target):
    logits = torch.zeros(2, VOCAB, dtype=target.dtype, device=target.device)
    logits[0, [8000, 5000, 8999]] = 3.0
    logits[1] = torch.nan
    zero = torch.zeros(2, device=target.device)
    assert draw(logits, zero, zero.long(), zero.int()).tolist() == [5000, 0]
    assert draw(logits, zero + 1, zero.long(), zero.int())[1] == 0
    kept = truncate(logits, zero + 1, 3 * (zero + 1).int(), zero + 0.5, zero)
    assert draw(logits, zero + 1, zero.long(), zero.int(), kept).tolist()[1] == 0


def test_no_rows(target):
    empty = torch.zeros(0, 10, dtype=target.dtype, device=target.device)
    none = empty[:, 0].float()
    kept = truncate(empty, none, none.int(), none, none)
    assert draw(empty, none, none.long(), none.int(), kept).shape == (0,)


POINTERS = {
    "logits": "*bf16", "temperature": "*fp32", "seed": "*i64", "index": "*i32", "floor": "*fp32", "last": "*i32",
    "best": "*fp32", "best_token": "*i32", "out": "*i32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32",
}  # fmt: skip


@pytest.mark.skipif(triton is None or INTERPRETED, reason="needs Triton-lang's compiler, not its interpreter")
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        (_draw_kernel, {"BLOCK": 4096}),
        (_draw_kernel, {"BLOCK": 4096, **dict.fromkeys(["floor", "last"])}),
        (_draw_kernel, {"BLOCK": 4096, **dict.fromkeys(["floor", "last", "temperature", "seed", "index"])}),
        (_pick_kernel, {"PARTS": LEAST_PARTS}),
        (_truncate_kernel, {"BLOCK": 4096}),
    ],
    ids=["draw_truncated", "draw", "draw_greedy", "pick", "truncate"],
)
def test_kernels_compile_for_hopper_without_atomics(kernel: Any, constants: dict[str, Any]):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx), "no atomics: results must not depend on scheduling"
    if kernel is _draw_kernel:
        assert ("mul.hi.u32" in ptx) == ("seed" not in constants), "Philox, and no trace of it without noise"
    if "logits" in names:
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx), "logits are read 16 bytes at a time"
