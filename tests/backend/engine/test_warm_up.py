# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable

import pytest

from multilora_backend.engine.warm_up import warm_up_rows
from multilora_kernels import block_m_for, row_step


@pytest.mark.parametrize("experts", [4, 60, 512])
@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 6, 8])
@pytest.mark.parametrize("max_rows", [1, 300, 5000])
def test_every_step_takes_variants_that_were_warmed_up(max_rows: int, top_k: int, experts: int):
    def variants(steps: Iterable[int]) -> set[tuple[bool, int, int]]:
        dense = {(False, block_m_for(n, 1), row_step(n)) for n in steps}
        return dense | {(True, block_m_for(n * top_k, experts), row_step(n * top_k)) for n in steps}

    warm = warm_up_rows(max_rows, top_k, experts)
    assert max(warm) == max_rows
    assert variants(warm) == variants(range(1, max_rows + 1))


def test_few_steps_are_enough():
    assert warm_up_rows(1) == [1]
    assert warm_up_rows(40) == [1, 17, 40]
    assert warm_up_rows(20_000) == [1, 17, 65, 513, 2049, 16385, 20_000]
    assert len(warm_up_rows(20_000, 8, 128)) <= 10
