# SPDX-License-Identifier: Apache-2.0
"""Shrink and expand together: isolation, determinism, the custom operators and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from multilora_kernels import (
    Delta,
    grouped_expand,
    grouped_expand_reference,
    grouped_shrink,
    grouped_shrink_reference,
    plan_segments,
)
from multilora_kernels._triton import INTERPRETED

ROWS = [3, -1, 0, 5, 5, -1, 1, 2, 4, 4, 0, -1, 3, 5, 2, 2]
RANKS = (1, 8, 16, 17, 40, 64)


def run_kernels(case, block_m: int = 16) -> torch.Tensor:
    segments, y = case.segments(block_m), case.y.clone()
    h = grouped_shrink(case.x, case.a, case.slices, segments)
    grouped_expand(y, Delta(h, case.b, segments), case.widths)
    return y


def run_reference(case) -> torch.Tensor:
    segments, y = case.segments(16), case.y.clone()
    h = grouped_shrink_reference(case.x, case.a, case.slices, segments)
    grouped_expand_reference(y, Delta(h, case.b, segments), case.widths)
    return y


def check_that_a_broken_adapter_stays_alone(case, run) -> None:
    clean = run(case)
    assert clean.isfinite().all(), "NaN of pages that nobody owns came through"
    broken_slot = 2
    case.a_of(broken_slot).fill_(torch.nan)
    case.b_of(broken_slot).fill_(torch.nan)
    broken = run(case)
    own = torch.from_numpy(case.rows == broken_slot)
    assert broken[own].isnan().all()
    assert torch.equal(broken[~own], clean[~own])


@pytest.mark.parametrize("run", [run_kernels, run_reference])
def test_nan_in_one_adapter_leaves_all_other_rows_bit_identical(target, make_case, run):
    check_that_a_broken_adapter_stays_alone(make_case(ROWS, target, ranks=RANKS), run)


def test_nan_in_one_token_stays_in_its_row(target, make_case):
    case = make_case([0] * 5, target, ranks=(20,))
    clean = run_kernels(case)
    case.x[2] = torch.nan
    broken = run_kernels(case)
    assert broken[2].isnan().all()
    assert torch.equal(broken[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.fixture
def row_wise_dot(monkeypatch):
    """The interpreter's tl.dot is numpy's BLAS, where float32 rounding depends on a row's place in the matrix."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.einsum("...mk,...kn->...mn", a, b, dtype=dtype, casting="unsafe", optimize=False)

    if INTERPRETED:
        monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("row_wise_dot")
@pytest.mark.parametrize("block_m", [16, 64])
def test_a_row_does_not_depend_on_its_place_or_on_the_other_rows(target, make_case, block_m):
    case = make_case(ROWS + [5, 0, -1] * 9, target, ranks=RANKS)
    together = run_kernels(case, block_m)
    shuffled = np.random.default_rng(0).permutation(len(case.rows))
    few = np.array([15, 3, 1, 0])  # has the largest rank, hence the same rank block
    for tokens in (shuffled, few):
        assert torch.equal(run_kernels(case.take(tokens), block_m), together[tokens.tolist()])


def test_same_bits_every_time(target, make_case):
    case = make_case(ROWS, target, ranks=RANKS)
    first = run_kernels(case)
    assert all(torch.equal(run_kernels(case), first) for _ in range(3 if target.device == "cuda" else 1))


def test_empty_tiles_do_nothing(target, make_case):
    case = make_case(ROWS, target, ranks=RANKS)
    plan, y = case.segments(16).plan, case.y.clone()
    padded = plan.pad_to(plan.num_tiles + 5).to(case.x.device)
    h = grouped_shrink(case.x, case.a, case.slices, padded)
    grouped_expand(y, Delta(h, case.b, padded), case.widths)
    assert torch.equal(y, run_kernels(case))
    nothing = replace(padded, tiles=torch.zeros_like(padded.tiles))
    grouped_expand(y, Delta(h, case.b, nothing), case.widths)
    assert torch.equal(y, run_kernels(case))


def test_operators_pass_opcheck(one_target, make_case):
    # Rank 16 everywhere: opcheck compares whole results, and of h the kernel fills only the adapters' own columns.
    case = make_case([1, 0, 0], one_target, ranks=(16, 16))
    segments, ops = case.segments(16), torch.ops.multilora
    plan, indices = segments.plan, (segments.rows, segments.tiles)
    most = (plan.h_ranks, plan.h_ranks)
    torch.library.opcheck(ops.grouped_shrink.default, (case.x, case.a, 3, *indices, 16, *most))
    h = grouped_shrink(case.x, case.a, 3, segments)
    torch.library.opcheck(ops.grouped_expand.default, (case.y, h, case.b, *indices, 16, plan.rank_block, case.widths))


def test_compile_traces_the_whole_graph(one_target, make_case):
    case = make_case(ROWS, one_target, ranks=RANKS)
    segments = case.segments(16)

    def linear(y, x):
        h = grouped_shrink(x, case.a, 3, segments)
        grouped_expand(y, Delta(h, case.b, segments), case.widths)
        return y * 2

    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(case.y.clone(), case.x), run_kernels(case) * 2)


def test_wrong_tensors_are_refused(one_target, make_case):
    case = make_case([0, 1], one_target, ranks=(3, 9))
    segments, y = case.segments(16), case.y.clone()
    with pytest.raises(ValueError, match="a must have dtype"):
        grouped_shrink(case.x, case.a.double(), 3, segments)
    with pytest.raises(ValueError, match="x must be dense in its last dimension"):
        grouped_shrink(case.x.T.contiguous().T, case.a, 3, segments)
    delta = case.delta(segments)
    with pytest.raises(ValueError, match=r"widths \(150, 33\) must add up"):
        grouped_expand(y, delta, (150, 33))
    with pytest.raises(ValueError, match="h must have dtype"):
        grouped_expand(y, replace(delta, h=delta.h.double()), case.widths)
    with pytest.raises(
        ValueError, match="y is 1 x 190, but delta has 190 columns in b, 2 rows in h and a plan for 2 tokens"
    ):
        grouped_expand(y[:1], delta, case.widths)
    assert torch.equal(y, case.y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none")
@pytest.mark.parametrize("num_tokens", [33, 2049])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_cuda_agrees_with_the_reference_at_the_size_of_a_model(make_case, num_tokens, block_m):
    rows = np.random.default_rng(0).integers(-1, 6, num_tokens).tolist()
    case = make_case(rows, ranks=RANKS, k=4096, widths=(4096, 1024, 1024)).to("cuda", torch.bfloat16)
    y, expected = run_kernels(case, block_m), run_reference(case)
    # h and y are rounded once in both, to values next to each other at worst.
    error, size = (y.float() - expected.float()).norm(dim=1), expected.float().norm(dim=1)
    assert (error <= 2 * torch.finfo(torch.bfloat16).eps * size).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels take CPU tensors")
def test_cpu_tensors_take_the_reference(make_case):
    case = make_case(ROWS, ranks=RANKS)
    assert torch.equal(run_kernels(case), run_reference(case))


def test_package_works_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError
import numpy as np, torch
from multilora_kernels import Delta, grouped_expand, grouped_shrink, plan_segments
segments = plan_segments(np.array([0, -1], np.int32), np.zeros(1, np.int32), np.full(1, 2, np.int32), 16).to("cpu")
x, a, b, y = torch.ones(2, 3), torch.ones(8, 3), torch.ones(8, 5), torch.zeros(2, 5)
grouped_expand(y, Delta(grouped_shrink(x, a, 1, segments), b, segments), (5,))
assert y.tolist() == [[6.0] * 5, [0.0] * 5], y
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_planning_needs_no_torch():
    # The package itself imports its kernels, and so torch.
    script = "import sys, types; sys.modules['torch'] = None; package = types.ModuleType('multilora_kernels')\n"
    script += "package.__path__ = [sys.argv[1]]; sys.modules['multilora_kernels'] = package\n"
    script += "from multilora_kernels import segments; import numpy as np; i = np.zeros(1, np.int32)\n"
    script += "assert segments.plan_segments(i, i, i + 4, 16).num_tiles == 1"
    folder = Path(sys.modules[plan_segments.__module__].__file__).parent
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
