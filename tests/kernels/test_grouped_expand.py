# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from multilora_kernels import Delta, grouped_expand, grouped_expand_reference

WIDTHS = [(150, 33, 7), (260,), (1, 128)]
MIXED = [3, -1, 0, 5, 5, -1, 1, 2, 4, 4, 0, -1, 3, 5] + [1] * 18


def check_kernel(case, block_m: int) -> None:
    delta, y = case.delta(case.segments(block_m)), case.y.clone()
    grouped_expand(y, delta, case.widths)
    case.check_delta(y, case.y, delta)


@pytest.mark.parametrize(("bordered", "block_m"), [(False, 16), (True, 16), (True, 64)])
def test_kernel_in_any_batch(batch, target, make_case, bordered, block_m):
    rows, ranks = batch
    check_kernel(make_case(rows, target, ranks=ranks, widths=WIDTHS[0], bordered=bordered), block_m)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("bordered", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_kernel_at_any_width(target, make_case, block_m, bordered, widths):
    case = make_case(MIXED, target, ranks=(1, 8, 16, 17, 40, 64), widths=widths, bordered=bordered)
    check_kernel(case, block_m)


@pytest.mark.parametrize("bordered", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_reference(batch, make_case, reference_target, bordered, widths):
    rows, ranks = batch
    case = make_case(rows, reference_target, ranks=ranks, widths=widths, bordered=bordered)
    delta, y = case.delta(case.segments(16)), case.y.clone()
    grouped_expand_reference(y, delta, widths)
    case.check_delta(y, case.y, delta)


@pytest.mark.parametrize("op", [grouped_expand, grouped_expand_reference])
def test_y_and_h_may_be_columns_of_one_buffer(target, make_case, op):
    case = make_case([1, -1, 0, 1], target, ranks=(3, 20), bordered=True)
    n, delta, y = sum(case.widths), case.delta(case.segments(16)), case.y.clone()
    wide = torch.full((4, 3 + n + delta.h.shape[1] + 6), 7.0, dtype=target.dtype, device=target.device)
    wide_y, wide_h = wide[:, 3 : 3 + n], wide[:, 3 + n : -6]
    wide_y.copy_(case.y)
    wide_h.copy_(delta.h)
    op(wide_y, Delta(wide_h, case.b, delta.segments), case.widths)
    op(y, delta, case.widths)
    assert torch.equal(wide_y, y)
    assert not torch.equal(y, case.y)
    torch.testing.assert_close(wide_h, delta.h, rtol=0, atol=0, equal_nan=True)
    assert (wide[:, :3] == 7).all()
    assert (wide[:, -6:] == 7).all()
