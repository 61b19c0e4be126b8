# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable

import pytest

from multilora_backend.engine.warm_up import warm_up_rows
from multilora_kernels import ANY_RANKS, FEW_RANKS, block_m_for, row_step


@pytest.mark.parametrize("experts", [4, 60, 512])
@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 6, 8])
@pytest.mark.parametrize("max_rows", [1, 300, 5000])
def test_every_step_takes_variants_that_were_warmed_up(max_rows: int, top_k: int, experts: int):
    def variants(steps: Iterable[tuple[int, int]], ranks: int) -> set[tuple[bool, int, int]]:
        met = set()
        for rows, groups in steps:
            met.add((False, block_m_for(rows, groups, ranks), row_step(rows)))
            met.add((True, block_m_for(rows * top_k, experts, ranks), row_step(rows * top_k)))
        return met

    warm = warm_up_rows(max_rows, top_k, experts)
    assert max(warm) == max_rows
    possible = [(rows, groups) for rows in range(1, max_rows + 1) for groups in {1, 3, rows // 20 + 1, rows}]
    for ranks in (FEW_RANKS, ANY_RANKS):
        assert variants([(rows, 1) for rows in warm], ranks) == variants(possible, ranks)


def test_few_steps_are_enough():
    assert warm_up_rows(1) == [1]
    assert warm_up_rows(40) == [1, 40]
    assert warm_up_rows(20_000) == [1, 65, 513, 1025, 2049, 16385, 20_000]
    assert len(warm_up_rows(20_000, 8, 128)) <= 12
