# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.engine.warm_up import warm_up_rows
from multilora_kernels import block_m_for, row_step


@given(st.integers(1, 20_000), st.integers(1, 12), st.sampled_from([8, 60, 128, 512]), st.data())
def test_every_step_takes_variants_that_were_warmed_up(max_rows: int, top_k: int, experts: int, data: st.DataObject):
    warm = warm_up_rows(max_rows, top_k, experts)
    rows = data.draw(st.integers(1, max_rows))
    assert (block_m_for(rows, 1), row_step(rows)) in {(block_m_for(n, 1), row_step(n)) for n in warm}
    visits = {(block_m_for(n * top_k, experts), row_step(n * top_k)) for n in warm}
    assert (block_m_for(rows * top_k, experts), row_step(rows * top_k)) in visits


def test_few_steps_are_enough():
    assert warm_up_rows(1) == [1]
    assert warm_up_rows(40) == [1, 17, 40]
    assert warm_up_rows(20_000) == [1, 17, 65, 513, 2049, 16385, 20_000]
    assert len(warm_up_rows(20_000, 8, 128)) <= 10
