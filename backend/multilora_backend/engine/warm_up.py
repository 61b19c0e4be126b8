# SPDX-License-Identifier: Apache-2.0
"""Which eager steps meet every variant of the LoRA kernels, so that no request waits for a compiler."""

from __future__ import annotations

from multilora_kernels import ANY_RANKS, FEW_RANKS, block_m_for, row_step


def warm_up_rows(max_rows: int, top_k: int = 0, num_experts: int = 0) -> list[int]:
    """Row counts, ascending: the first of each variant up to `max_rows`, by kind of rank, tiles and row step.

    With experts the kernels also run on visits, `top_k` a row, and take the variants of so many rows.
    """
    first: dict[tuple[bool, int, int, int], int] = {}
    for rows in range(1, max_rows + 1):
        visits = rows * top_k
        for ranks in (FEW_RANKS, ANY_RANKS):
            first.setdefault((False, ranks, block_m_for(rows, 1, ranks), row_step(rows)), rows)
            if num_experts:
                first.setdefault((True, ranks, block_m_for(visits, num_experts, ranks), row_step(visits)), rows)
    return sorted({*first.values(), max_rows})
