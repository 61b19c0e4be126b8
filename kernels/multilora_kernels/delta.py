# SPDX-License-Identifier: Apache-2.0
"""What LoRA adds to one fused linear, on its way from x A^T to the kernel that adds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from multilora_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class Delta:
    """y[t, slice i] gets h[t, slice i] B_i with the B of token t's adapter; tokens without adapter get nothing.

    All three are read under the same segments. A pool belongs to one linear; slice i owns its own columns of b.
    """

    h: Tensor
    """[T, H] x A^T by token, last dimension dense, y's dtype. `SegmentPlan.tiles` says which columns are a tile's;
    all others may hold anything, NaN included, and are never used."""
    b: Tensor
    """[R, N] rank-major pool of this linear, rows dense, y's dtype, multiplied by the adapters' scale."""
    segments: Segments
    """The step's tokens by adapter, on h's device."""

    def require(self, op: str, name: str, rows: int, columns: int) -> None:
        """Raises ValueError unless this fits the output `name`, [rows, columns], of a fused linear."""
        num_tokens = self.segments.plan.num_tokens
        if not (self.b.shape[1] == columns and rows == self.h.shape[0] == num_tokens):
            raise ValueError(
                f"{op}: {name} is {rows} x {columns}, but delta has {self.b.shape[1]} columns in b, "
                f"{self.h.shape[0]} rows in h and a plan for {num_tokens} tokens"
            )
