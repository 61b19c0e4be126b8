# SPDX-License-Identifier: Apache-2.0
"""Rope with LoRA in the same pass."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels import Delta
from multilora_kernels.rope import rope_write, rope_write_reference
from rope_cases import NORMS, UNTOUCHED, bits, check_against_fp64, make_setup

RANKS = (1, 8, 12, 40)
ROWS = [3, -1, 0, 2, 2, -1, 1, 2, 0, -1, 3, 1, -1] * 3


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
