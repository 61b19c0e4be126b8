# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from multilora_kernels import grouped_expand, grouped_expand_reference
from multilora_kernels.segments import rank_blocks

WIDTHS_AND_SPLITS = [((150, 33, 7), 1), ((260,), 2), ((1, 128), 4)]


def make_h(case, segments, splits: int) -> torch.Tensor:
    """Random h as grouped_shrink leaves it: zero beyond each row's rank, float32 if it is split."""
    plan = segments.plan
    h = torch.zeros(splits, len(case.widths), plan.num_tokens, rank_blocks(plan.max_rank)[1])
    generator = torch.Generator().manual_seed(0)
    for first, end, _, rank in plan.groups.tolist():
        h[:, :, first:end, :rank] = torch.randn(splits, len(case.widths), end - first, rank, generator=generator)
    return h.to(case.x.device, case.x.dtype if splits == 1 else torch.float32)


def check_against_fp64(y: torch.Tensor, h: torch.Tensor, case, segments) -> None:
    """Elementwise: the sums over splits and ranks in float32, and the roundings of h, h B and y to the dtype."""
    fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(y.dtype).eps
    without_adapter = sorted(set(range(len(case.rows))) - set(segments.order.tolist()))
    assert torch.equal(y[without_adapter], case.y[without_adapter]), "rows without adapter, bit for bit"
    for m, token in enumerate(segments.order.tolist()):
        slot = int(case.rows[token])
        rank, column = int(case.rank[slot]), 0
        for i, width in enumerate(case.widths):
            columns = slice(column, column + width)
            row = h[:, i, m, :rank].double()
            b, before = case.b[case.owned(slot), columns].double(), case.y[token, columns].double()
            expected = before + row.sum(0) @ b
            magnitude = before.abs() + row.abs().sum(0) @ b.abs()
            error = (y[token, columns].double() - expected).abs()
            assert (error <= ((rank + len(h) + 2) * fp32 + 2 * rounding) * magnitude).all()
            column += width


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("widths", "splits"), WIDTHS_AND_SPLITS)
def test_kernel(batch, target, make_case, block_m, widths, splits):
    rows, ranks = batch
    case = make_case(rows, target, ranks=ranks, widths=widths)
    segments = case.segments(block_m)
    h, y = make_h(case, segments, splits), case.y.clone()
    grouped_expand(y, h, case.b, widths, segments)
    check_against_fp64(y, h, case, segments)


def test_kernel_writes_strided_rows_and_nothing_beside_them(target, make_case):
    case = make_case([1, -1, 0, 1], target, ranks=(3, 20))
    n = sum(case.widths)
    wide = torch.full((4, n + 40), 7.0, dtype=target.dtype, device=target.device)
    wide[:, 3 : 3 + n] = case.y
    segments = case.segments(16)
    h, y = make_h(case, segments, 1), case.y.clone()
    grouped_expand(wide[:, 3 : 3 + n], h, case.b, case.widths, segments)
    grouped_expand(y, h, case.b, case.widths, segments)
    assert torch.equal(wide[:, 3 : 3 + n], y)
    assert not torch.equal(y, case.y)
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 3 + n :] == 7).all()


@pytest.mark.parametrize(("widths", "splits"), WIDTHS_AND_SPLITS)
def test_reference(batch, make_case, reference_target, widths, splits):
    rows, ranks = batch
    case = make_case(rows, reference_target, ranks=ranks, widths=widths)
    segments = case.segments(16)
    h = make_h(case, segments, splits)
    wide = torch.zeros(len(rows), sum(widths) + 9, dtype=reference_target.dtype)
    y = wide[:, 4 : 4 + sum(widths)]
    y.copy_(case.y)
    grouped_expand_reference(y, h, case.b, widths, segments)
    check_against_fp64(y, h, case, segments)
    assert (wide[:, :4] == 0).all()
    assert (wide[:, 4 + sum(widths) :] == 0).all()
