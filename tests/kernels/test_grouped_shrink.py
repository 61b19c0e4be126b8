# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from multilora_kernels import grouped_shrink, grouped_shrink_reference
from multilora_kernels.segments import rank_blocks


def check_against_fp64(h: torch.Tensor, case, segments) -> None:
    """Elementwise: K float32 additions and one rounding to h's dtype may go wrong, and nothing else."""
    k = case.x.shape[1]
    fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(h.dtype).eps
    ranks = rank_blocks(segments.plan.max_rank)[1]
    assert h.shape[1:] == (len(case.widths), segments.plan.num_tokens, ranks)
    total = h.double().sum(dim=0)
    for m, token in enumerate(segments.order.tolist()):
        slot = int(case.rows[token])
        x, a = case.x[token].double(), case.a[:, case.owned(slot)].double()
        expected, magnitude = a @ x, a.abs() @ x.abs()
        error = (total[:, m, : case.rank[slot]] - expected).abs()
        assert (error <= (k + 8) * fp32 * magnitude + rounding * expected.abs()).all()
        assert (total[:, m, case.rank[slot] :] == 0).all(), "columns beyond the own rank"


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("k", "splits"), [(100, 1), (37, 2), (700, 4)])
def test_kernel(batch, target, make_case, block_m, k, splits):
    rows, ranks = batch
    case = make_case(rows, target, ranks=ranks, k=k)
    segments = case.segments(block_m)
    h = grouped_shrink(case.x, case.a, segments, splits)
    assert h.shape[0] == splits
    assert h.dtype == (target.dtype if splits == 1 else torch.float32)
    check_against_fp64(h, case, segments)


def test_kernel_reads_strided_rows(target, make_case):
    case = make_case([1, -1, 0, 1], target, ranks=(3, 20), k=70)
    wide_x = torch.full((4, 91), torch.nan, dtype=target.dtype, device=target.device)
    wide_a = torch.full((*case.a.shape[:2], 80), torch.nan, dtype=target.dtype, device=target.device)
    wide_x[:, 5:75], wide_a[:, :, 3:73] = case.x, case.a
    segments = case.segments(16)
    h = grouped_shrink(wide_x[:, 5:75], wide_a[:, :, 3:73], segments)
    assert torch.equal(h, grouped_shrink(case.x, case.a, segments))


def test_reference(batch, make_case, reference_target):
    rows, ranks = batch
    case = make_case(rows, reference_target, ranks=ranks, k=131)
    segments = case.segments(16)
    check_against_fp64(grouped_shrink_reference(case.x, case.a, segments), case, segments)
