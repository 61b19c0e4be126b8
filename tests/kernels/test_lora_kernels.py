# SPDX-License-Identifier: Apache-2.0
"""Shrink and expand together: isolation, determinism, the custom operators and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from multilora_kernels import (
    grouped_expand,
    grouped_shrink,
    grouped_shrink_reference,
    lora_delta,
    plan_segments,
    splits_for,
)
from multilora_kernels._triton import INTERPRETED

ROWS = [3, -1, 0, 5, 5, -1, 1, 2, 4, 4, 0, -1, 3, 5, 2, 2]
RANKS = (1, 8, 16, 17, 40, 64)


def run_kernels(case, block_m: int = 16, splits: int = 1) -> torch.Tensor:
    segments, y = case.segments(block_m), case.y.clone()
    h = grouped_shrink(case.x, case.a, segments, splits)
    grouped_expand(y, h, case.b, case.widths, segments)
    return y


def run_reference(case) -> torch.Tensor:
    y = case.y.clone()
    lora_delta(y, case.x, case.a, case.b, case.widths, case.segments(16))
    return y


def check_that_a_broken_adapter_stays_alone(case, run) -> None:
    clean = run(case)
    assert clean.isfinite().all(), "NaN of pages that nobody owns came through"
    broken_slot = 2
    case.a[:, case.owned(broken_slot)] = torch.nan
    case.b[case.owned(broken_slot)] = torch.nan
    broken = run(case)
    own = torch.from_numpy(case.rows == broken_slot)
    assert broken[own].isnan().all()
    assert torch.equal(broken[~own], clean[~own])


@pytest.mark.parametrize("splits", [1, 2])
def test_nan_in_one_adapter_leaves_all_other_rows_bit_identical(target, make_case, splits):
    case = make_case(ROWS, target, ranks=RANKS)
    check_that_a_broken_adapter_stays_alone(case, lambda case: run_kernels(case, splits=splits))


def test_nan_in_one_adapter_leaves_all_other_rows_bit_identical_in_the_reference(make_case):
    case = make_case(ROWS, ranks=RANKS)
    check_that_a_broken_adapter_stays_alone(case, run_reference)


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
        return np.einsum("mk,kn->mn", a, b, dtype=dtype, casting="unsafe", optimize=False)

    if INTERPRETED:
        monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("row_wise_dot")
@pytest.mark.parametrize(("block_m", "splits"), [(16, 1), (16, 2), (64, 1)])
def test_a_row_does_not_depend_on_its_place_or_on_the_other_rows(target, make_case, block_m, splits):
    case = make_case(ROWS + [5, 0, -1] * 9, target, ranks=RANKS)
    together = run_kernels(case, block_m, splits)
    shuffled = np.random.default_rng(0).permutation(len(case.rows))
    few = np.array([15, 3, 1, 0])  # has the largest rank, hence the same rank block
    for tokens in (shuffled, few):
        assert torch.equal(run_kernels(case.take(tokens), block_m, splits), together[tokens.tolist()])


def test_tiles_of_zeros_do_nothing(target, make_case):
    case = make_case(ROWS, target, ranks=RANKS)
    segments, y = case.segments(16), case.y.clone()
    padded = torch.cat([segments.tiles, torch.zeros_like(segments.tiles)])
    ops = torch.ops.multilora
    h = ops.grouped_shrink(case.x, case.a, segments.order, padded, 16, segments.plan.max_rank, 1)
    ops.grouped_expand(y, h, case.b, segments.order, padded, 16, case.widths)
    assert torch.equal(y, run_kernels(case))


def test_operators_pass_opcheck(target, make_case):
    case = make_case(ROWS, target, ranks=RANKS)
    segments, ops = case.segments(16), torch.ops.multilora
    for splits in (1, 2):
        arguments = (case.x, case.a, segments.order, segments.tiles, 16, segments.plan.max_rank, splits)
        torch.library.opcheck(ops.grouped_shrink.default, arguments)
    h = grouped_shrink(case.x, case.a, segments)
    torch.library.opcheck(
        ops.grouped_expand.default, (case.y, h, case.b, segments.order, segments.tiles, 16, case.widths)
    )


def test_compile_traces_the_whole_graph(target, make_case):
    case = make_case(ROWS, target, ranks=RANKS)
    segments = case.segments(16)

    def linear(y, x):
        h = grouped_shrink(x, case.a, segments)
        grouped_expand(y, h, case.b, case.widths, segments)
        return y * 2

    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(case.y.clone(), case.x), run_kernels(case) * 2)


def test_wrong_tensors_are_refused(target, make_case):
    case = make_case([0, 1], target, ranks=(3, 9))
    segments, y = case.segments(16), case.y.clone()
    with pytest.raises(ValueError, match="x has 99 columns, a has 100"):
        grouped_shrink(case.x[:, :99], case.a, segments)
    with pytest.raises(ValueError, match="a must have dtype"):
        grouped_shrink(case.x, case.a.double(), segments)
    with pytest.raises(ValueError, match="x must be dense in its last dimension"):
        grouped_shrink(case.x.T.contiguous().T, case.a, segments)
    h = grouped_shrink(case.x, case.a, segments)
    with pytest.raises(ValueError, match=r"slice widths \[150, 33\] must add up"):
        grouped_expand(y, h, case.b, (150, 33), segments)
    with pytest.raises(ValueError, match="h has 3 slices, but 1 widths"):
        grouped_expand(y, h, case.b, (190,), segments)
    assert torch.equal(y, case.y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none")
def test_lora_delta_on_cuda_agrees_with_the_cpu(make_case):
    on_cpu = make_case(ROWS, ranks=RANKS, k=4096)
    on_cuda = on_cpu.to("cuda")
    # Each element is a sum over 64 ranks of sums over 4096 products, all of magnitude 1.
    bound = (4096 + 64) * torch.finfo(torch.float32).eps * 64 * 4096**0.5
    assert (run_reference(on_cuda).cpu() - run_reference(on_cpu)).abs().max() < bound


def test_splits_fill_an_idle_gpu_and_stay_away_from_short_sums(make_case):
    case = make_case([0], ranks=(16,))
    one_tile = case.segments(16)
    assert splits_for(one_tile, slices=1, in_features=14336) == 8
    assert splits_for(one_tile, slices=3, in_features=4096) == 4
    assert splits_for(one_tile, slices=1, in_features=1024) == 1
    many = plan_segments(np.zeros(4096, np.int32), np.zeros(1, np.int32), np.full(1, 16, np.int32), 16).to("cpu")
    assert splits_for(many, slices=1, in_features=14336) == 1


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_with_the_way_out(make_case):
    case = make_case([0], ranks=(4,))
    segments = case.segments(16)
    with pytest.raises(
        RuntimeError, match=r"grouped_shrink: needs tensors on a CUDA device, got cpu.*TRITON_INTERPRET=1"
    ):
        grouped_shrink(case.x, case.a, segments)
    h = grouped_shrink_reference(case.x, case.a, segments)
    with pytest.raises(RuntimeError, match="use grouped_expand_reference"):
        grouped_expand(case.y, h, case.b, case.widths, segments)


def test_package_works_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError
import numpy as np, torch
from multilora_kernels import grouped_shrink, lora_delta, plan_segments
segments = plan_segments(np.array([0, -1], np.int32), np.zeros(1, np.int32), np.full(1, 2, np.int32), 16).to("cpu")
x, a, b, y = torch.ones(2, 3), torch.ones(1, 8, 3), torch.ones(8, 5), torch.zeros(2, 5)
lora_delta(y, x, a, b, (5,), segments)
assert y.tolist() == [[6.0] * 5, [0.0] * 5], y
try:
    grouped_shrink(x, a, segments)
except RuntimeError as error:
    assert "not installed" in str(error), error
else:
    raise SystemExit("a kernel ran without triton")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_planning_needs_no_torch():
    script = "import importlib.util as u, sys; sys.modules['torch'] = None\n"
    script += "spec = u.spec_from_file_location('segments', sys.argv[1]); module = u.module_from_spec(spec)\n"
    script += "sys.modules['segments'] = module; spec.loader.exec_module(module)\n"
    script += (
        "import numpy as np; i = np.zeros(1, np.int32); assert module.plan_segments(i, i, i + 4, 16).num_tiles == 1"
    )
    path = sys.modules[plan_segments.__module__].__file__
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
