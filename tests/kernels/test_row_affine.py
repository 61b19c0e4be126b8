# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from multilora_kernels import Affine, row_affine, row_affine_reference
from multilora_kernels.row_affine import UNIT

OPS = [row_affine, row_affine_reference]
WIDTHS = [1, 37, 256, 700]
UNTOUCHED = 3
"""Every slot but this one (where there is one) has vectors."""


@dataclass(frozen=True)
class Affines:
    """y and the vectors of a case's adapters, laid out far from in order; whatever is not theirs is NaN."""

    y: torch.Tensor
    affine: Affine
    rows: np.ndarray

    def touched(self) -> torch.Tensor:
        offsets = self.affine.offsets.cpu().numpy()
        return torch.from_numpy((self.rows >= 0) & (offsets[self.rows] >= 0 if len(offsets) else False))

    def expected(self) -> torch.Tensor:
        """fp64 on the CPU."""
        out, values, width = self.y.double().cpu(), self.affine.values.double().cpu(), self.y.shape[1]
        for row in self.touched().nonzero().flatten().tolist():
            start = int(self.affine.offsets[self.rows[row]]) * UNIT
            gain, shift = values[start : start + 2 * width].split(width)
            out[row] = gain * out[row] + shift
        return out


@pytest.fixture
def make(make_case: Callable) -> Callable[..., Affines]:
    def make(rows, ranks, target, width: int, block_m: int = 16) -> Affines:
        case = make_case(rows, target, ranks=ranks, widths=(width,))
        generator = torch.Generator().manual_seed(width)
        block = -(-2 * width // UNIT) + 2
        values = torch.full((block * len(ranks) * UNIT,), torch.nan)
        offsets = torch.full((len(ranks),), -1, dtype=torch.int32)
        for slot in range(len(ranks)):
            if slot != UNTOUCHED:
                offsets[slot] = block * (len(ranks) - 1 - slot) + 1
                start = int(offsets[slot]) * UNIT
                values[start : start + 2 * width] = torch.randn(2 * width, generator=generator)
        device = target.device
        return Affines(case.y, Affine(values.to(device), offsets.to(device), case.segments(block_m)), case.rows)

    return make


def check(actual: torch.Tensor, case: Affines) -> None:
    """float32 product and sum, one rounding; all other rows bit for bit, the sign of zero included."""
    touched = case.touched()
    others, before = actual.cpu()[~touched], case.y.cpu()[~touched]
    assert torch.equal(others, before)
    assert torch.equal(others.signbit(), before.signbit())
    expected = case.expected()[touched]
    fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(actual.dtype).eps
    magnitude = case.y.double().cpu()[touched].abs() * 8 + expected.abs() + 8  # vectors are below 8
    error = (actual.double().cpu()[touched] - expected).abs()
    assert (error <= 2 * fp32 * magnitude + rounding * expected.abs()).all()


def check_kernel(case: Affines) -> None:
    y = case.y.clone()
    row_affine(y, case.affine)
    check(y, case)


@pytest.mark.parametrize(("width", "block_m"), [(37, 16), (256, 128)])
def test_kernel_in_any_batch(batch, target, make, width, block_m):
    check_kernel(make(*batch, target, width, block_m))


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("width", WIDTHS)
def test_kernel_at_any_width(target, make, width, block_m):
    check_kernel(make([3, -1, 0, 5, 5, -1, 1, 2, 4, 4, 0] + [1] * 18, (1, 8, 16, 17, 40, 64), target, width, block_m))


@pytest.mark.parametrize("width", WIDTHS)
def test_reference(batch, reference_target, make, width):
    rows, ranks = batch
    case = make(rows, ranks, reference_target, width)
    y = case.y.clone()
    row_affine_reference(y, case.affine)
    check(y, case)


def test_kernel_and_reference_agree_bit_for_bit(target, make):
    case = make([3, -1, 0, 5, 5, 1, 2, 4, 4] * 5, (1, 8, 16, 17, 40, 64), target, 129)
    results = []
    for op in OPS:
        results.append(case.y.clone())
        op(results[-1], case.affine)
    assert torch.equal(*results)


@pytest.mark.parametrize("op", OPS)
def test_strided_rows_and_padding_tiles(target, make, op):
    case = make([1, -1, 0, 1], (3, 20), target, 50)
    plan = case.affine.segments.plan
    padded = replace(case.affine, segments=plan.pad_to(plan.num_tiles + 4).to(target.device))
    wide = torch.full((4, 77), 7.0, dtype=target.dtype, device=target.device)
    wide[:, 9:59] = case.y
    op(wide[:, 9:59], padded)
    check(wide[:, 9:59], case)
    assert (wide[:, :9] == 7).all()
    assert (wide[:, 59:] == 7).all()


@pytest.mark.parametrize("op", OPS)
def test_nan_of_one_adapter_stays_in_its_rows(target, make, op):
    case = make([2, 0, -1, 1, 2], (8, 8, 8), target, 40)
    start = int(case.affine.offsets[2]) * UNIT
    case.affine.values[start : start + 80] = torch.nan
    y = case.y.clone()
    op(y, case.affine)
    assert y.isnan().all(dim=1).tolist() == [True, False, False, False, True]
    assert y[1:4].isfinite().all()


def test_operator_passes_opcheck(one_target, make):
    case = make([1, 0, 0], (16, 16), one_target, 24)
    affine, segments = case.affine, case.affine.segments
    arguments = (case.y, affine.values, affine.offsets, segments.rows, segments.tiles, segments.plan.block_m)
    torch.library.opcheck(torch.ops.multilora.row_affine.default, arguments)


def test_compile_traces_the_whole_graph(one_target, make):
    case = make([1, 0, -1], (16, 16), one_target, 24)

    def scaled(y: torch.Tensor) -> torch.Tensor:
        row_affine(y, case.affine)
        return y * 2

    expected = case.y.clone()
    row_affine(expected, case.affine)
    assert torch.equal(torch.compile(scaled, fullgraph=True, backend="eager")(case.y.clone()), expected * 2)


def test_wrong_tensors_are_refused(one_target, make):
    case = make([0, 1], (3, 9), one_target, 20)
    affine, y = case.affine, case.y.clone()
    with pytest.raises(ValueError, match="y has 1 rows, its plan 2 tokens"):
        row_affine(y[:1], affine)
    with pytest.raises(ValueError, match="values must be contiguous float32"):
        row_affine(y, replace(affine, values=affine.values.double()))
    with pytest.raises(ValueError, match="offsets must be contiguous int32"):
        row_affine(y, replace(affine, offsets=affine.offsets.long()))
    assert torch.equal(y, case.y)
