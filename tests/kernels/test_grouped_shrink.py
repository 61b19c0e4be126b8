# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from multilora_kernels import grouped_shrink, grouped_shrink_reference, padded_rank, plan_segments
from multilora_kernels.grouped_shrink import SPLIT, Blocks, blocks_for
from multilora_kernels.variants import BLOCK_M_CHOICES


def check_against_fp64(h: torch.Tensor, case, segments) -> None:
    """Elementwise: K float32 additions and one rounding to h's dtype may go wrong, and nothing else."""
    k = case.x.shape[1]
    fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(h.dtype).eps
    assert h.dtype == case.x.dtype
    assert h.shape == (len(case.rows), case.slices * segments.plan.h_ranks)
    for token in case.with_adapter():
        x, a = case.x[token].double(), case.a_of(int(case.rows[token])).double()
        expected, magnitude = a @ x, a.abs() @ x.abs()
        error = (case.h_of(h, token, segments.plan).double() - expected).abs()
        assert (error <= (k + 8) * fp32 * magnitude + rounding * expected.abs()).all()


@pytest.mark.parametrize(
    ("block_m", "k", "blocks"),
    [
        (16, 37, Blocks(64, 128, 3)),
        (16, 700, Blocks(16, 256, 4)),
        (32, 700, Blocks(32, 64, 4)),
        (64, 100, Blocks(64, 64, 2)),
        (64, 37, Blocks(16, 128, 4)),
    ],
)
def test_kernel(batch, target, make_case, monkeypatch, block_m, k, blocks):
    rows, ranks = batch
    case = make_case(rows, target, ranks=ranks, k=k)
    segments = case.segments(block_m)
    # Smaller blocks than the launcher's, so that a K that the interpreter can do in time has several.
    module = importlib.import_module(blocks_for.__module__)  # the package has the function under this name
    monkeypatch.setattr(module, "blocks_for", lambda *arguments: blocks)
    check_against_fp64(grouped_shrink(case.x, case.a, case.slices, segments), case, segments)


def test_kernel_reads_strided_rows(target, make_case):
    case = make_case([1, -1, 0, 1], target, ranks=(3, 20), k=70)
    wide_x = torch.full((4, 91), torch.nan, dtype=target.dtype, device=target.device)
    wide_a = torch.full((case.a.shape[0], 80), torch.nan, dtype=target.dtype, device=target.device)
    wide_x[:, 5:75], wide_a[:, 3:73] = case.x, case.a
    segments = case.segments(16)
    h = grouped_shrink(wide_x[:, 5:75], wide_a[:, 3:73], case.slices, segments)
    expected = grouped_shrink(case.x, case.a, case.slices, segments)
    for token in case.with_adapter():
        assert torch.equal(case.h_of(h, token, segments.plan), case.h_of(expected, token, segments.plan))


def test_h_is_as_wide_as_a_graphs_largest_rank_when_its_plan_says_so(target, make_case):
    """A captured graph serves steps of smaller ranks: h keeps its width, and the tiles say where the ranks lie."""
    case = make_case([0, 1, -1], target, ranks=(3, 20), k=70)
    few = case.take(np.array([0, 2]))
    captured, step = case.segments(16), few.segments(16)
    assert step.plan.h_ranks < captured.plan.h_ranks
    op = torch.ops.multilora.grouped_shrink
    h = op(few.x, few.a, 3, step.rows, step.tiles, 16, captured.plan.h_ranks, captured.plan.h_ranks)
    assert h.shape[1] == 3 * captured.plan.h_ranks
    exact = few.a_of(0).double() @ few.x[0].double()
    own = h[0, : 3 * step.plan.h_ranks].view(3, -1)[:, :3].double()
    assert (own - exact).abs().max() < 70**0.5 * 70 * torch.finfo(target.dtype).eps


def test_reference(batch, make_case, reference_target):
    rows, ranks = batch
    case = make_case(rows, reference_target, ranks=ranks, k=131)
    segments = case.segments(16)
    check_against_fp64(grouped_shrink_reference(case.x, case.a, case.slices, segments), case, segments)


def check_in_a_border(op, batch, target, make_case) -> None:
    """Each adapter's ranks lie where the plan says."""
    rows, ranks = batch
    case = make_case(rows, target, ranks=ranks, k=70, bordered=True)
    segments, width = case.segments(16), sum(padded_rank(rank) + 8 for rank in ranks)
    h = op(case.x, case.a, case.slices, segments, width)
    assert h.shape == (len(rows), case.slices * width)
    for token in case.with_adapter():
        exact = case.a_of(int(rows[token])).double() @ case.x[token].double()
        error = (case.h_of(h, token, segments.plan).double() - exact).abs().max()
        assert error < 70**0.5 * 70 * torch.finfo(target.dtype).eps


def test_kernel_in_a_border(batch, target, make_case):
    check_in_a_border(grouped_shrink, batch, target, make_case)


def test_reference_in_a_border(batch, make_case, reference_target):
    check_in_a_border(grouped_shrink_reference, batch, reference_target, make_case)


@pytest.mark.parametrize("block_m", BLOCK_M_CHOICES)
@pytest.mark.parametrize("kib", [99, 163, 227])
def test_what_a_program_takes_fits_its_gpu(block_m, kib):
    """227 KiB on Hopper, 163 on A100, 99 on L40S, L4 and A10."""
    for slices in (1, 2, 3):
        for rows in (1, 512, 513):
            widest = blocks_for(block_m, slices, rows, 2, 227 * 1024)
            for itemsize in (2, 4):
                c, k, stages = blocks_for(block_m, slices, rows, itemsize, kib * 1024)
                assert (stages - 1) * (block_m + c) * k * itemsize <= kib * 1024
                assert (c, stages) == (widest.c, widest.stages)
                assert k // SPLIT >= 16, "what tl.dot needs"
                if kib == 227:
                    assert k * itemsize == widest.k * 2, "nothing is cut where there is room"


def test_many_rows_have_more_programs_on_their_way_and_fewer_bytes_each():
    stages = [[blocks_for(16, slices, rows, 2, 227 * 1024).stages for rows in (1, 512, 513)] for slices in (1, 2, 3)]
    assert stages == [[4, 4, 4], [4, 4, 3], [4, 4, 3]]


def test_shapes_that_do_not_fit_are_refused():
    segments = plan_segments(np.zeros(2, np.int32), np.zeros(1, np.int32), np.full(1, 4, np.int32), 16).to("cpu")
    with pytest.raises(ValueError, match="x has 99 columns, a has 100"):
        grouped_shrink(torch.zeros(2, 99), torch.zeros(24, 100), 3, segments)
    with pytest.raises(ValueError, match="x has 3 rows, the plan 2 tokens"):
        grouped_shrink(torch.zeros(3, 100), torch.zeros(24, 100), 3, segments)
    with pytest.raises(ValueError, match="a has 25 rows, which 3 slices do not divide"):
        grouped_shrink(torch.zeros(2, 100), torch.zeros(25, 100), 3, segments)


@pytest.mark.parametrize(
    ("rows", "slices", "kib", "launched"),
    [
        (5, 1, 227, (16, 1024, 4)),
        (5, 1, 99, (16, 512, 4)),
        (5, 3, 99, (16, 512, 4)),
        (600, 3, 227, (16, 512, 3)),
        (600, 1, 163, (16, 512, 4)),
    ],
)
def test_what_is_launched_depends_on_the_rows_and_fits_the_gpu(monkeypatch, rows, slices, kib, launched):
    """By a kernel that only notes its options, since no test can count on GPUs with so much shared memory."""
    module = importlib.import_module(blocks_for.__module__)
    options = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]):
            return lambda *arguments, **constants: options.update(constants)

    monkeypatch.setattr(module, "_shrink_kernel", Kernel())
    monkeypatch.setattr(module, "shared_memory", lambda device: kib * 1024)
    plan = plan_segments(np.zeros(rows, np.int32), np.zeros(1, np.int32), np.full(1, 4, np.int32), 16)
    segments = plan.to("cpu")
    x, a = torch.zeros(rows, 64, dtype=torch.bfloat16), torch.zeros(8 * slices, 64, dtype=torch.bfloat16)
    module._launch(x, a, slices, segments.rows, segments.tiles, 16, 16, 16)
    assert (options["BLOCK_C"], options["BLOCK_K"], options["num_stages"]) == launched
