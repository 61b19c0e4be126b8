# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from multilora_kernels import CopyTable, copy_blocks, copy_blocks_reference

SITES = [(3, 40), (1, 8), (2, 5000)]
"""slices and columns"""
MOVES = [(8, 0, 8), (40, 16, 24), (0, 8, 8)]


def tables(device: str, dtype: torch.dtype) -> tuple[CopyTable, list[torch.Tensor]]:
    """Pools full of NaN but for the moved ranks, borders full of 7, and the borders as they should become."""
    generator = torch.Generator().manual_seed(0)
    pools, borders, expected = [], [], []
    for slices, columns in SITES:
        pool = torch.full((72 * slices, columns), torch.nan)
        border = torch.full((48 * slices, columns), 7.0)
        wanted = border.clone()
        for source, target, ranks in MOVES:
            block = torch.randn(ranks * slices, columns, generator=generator)
            pool[source * slices : (source + ranks) * slices] = block
            wanted[target * slices : (target + ranks) * slices] = block
        # As in the model: the border is the tail of a wider buffer's rows.
        buffer = torch.full((30 + len(border), columns), 7.0, dtype=dtype, device=device)
        pools.append(pool.to(device, dtype))
        borders.append(buffer[30:])
        expected.append(wanted.to(device, dtype))
    return CopyTable.of(pools, borders, [slices for slices, _ in SITES]), expected


def check(table: CopyTable, expected: list[torch.Tensor]) -> None:
    for border, wanted in zip(table.borders, expected, strict=True):
        assert torch.equal(border, wanted)
        base = border._base
        assert base is not None
        assert (base[:30] == 7).all(), "the base weights above the border"


def test_kernel(target):
    table, expected = tables(target.device, target.dtype)
    copy_blocks(table, torch.tensor(MOVES, dtype=torch.int32, device=target.device))
    check(table, expected)


def test_reference(reference_target):
    table, expected = tables("cpu", reference_target.dtype)
    copy_blocks_reference(table, torch.tensor(MOVES, dtype=torch.int32))
    check(table, expected)


@pytest.mark.parametrize("op", [copy_blocks, copy_blocks_reference])
def test_no_moves_copy_nothing(target, op):
    table, _ = tables(target.device, target.dtype)
    op(table, torch.empty(0, 3, dtype=torch.int32, device=target.device))
    assert all((border == 7).all() for border in table.borders)


def test_sites_that_cannot_be_copied_are_refused_by_number():
    good = torch.zeros(16, 8)
    with pytest.raises(
        ValueError, match=r"site 1 has a pool of torch.float32 with 8 columns, but a border of torch.float16"
    ):
        CopyTable.of([good, good], [good, good.half()], [1, 1])
    with pytest.raises(ValueError, match="site 0 needs a contiguous pool and border"):
        CopyTable.of([torch.zeros(16, 9)[:, :8]], [good], [1])
    with pytest.raises(ValueError, match="site 0 has rows of 20 bytes, not aligned to 16"):
        CopyTable.of([torch.zeros(16, 5)], [torch.zeros(16, 5)], [1])
