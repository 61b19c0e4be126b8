# SPDX-License-Identifier: Apache-2.0
"""What the kernels read of a step's segments."""

from __future__ import annotations

from multilora_kernels._triton import jit, tl


@jit
def load_tokens(rows, BLOCK_M: tl.constexpr):
    """int64 [BLOCK_M]: the tokens of the program's tile, which axis 1 of the grid counts, and -1 where it has none.

    Asked for together with the tile: were they found through its first row, everything else would wait for one load
    more, of some 0.7 us in each program.
    """
    return tl.load(rows + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
