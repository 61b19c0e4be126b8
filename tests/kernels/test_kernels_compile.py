# SPDX-License-Identifier: Apache-2.0
"""The kernels through Triton's compiler for Hopper, which needs no GPU: what the interpreter cannot see."""

from __future__ import annotations

import re
from typing import Any

import pytest

from multilora_kernels._triton import INTERPRETED, triton
from multilora_kernels.copy_blocks import _copy_kernel
from multilora_kernels.grouped_expand import _expand_kernel
from multilora_kernels.grouped_shrink import BLOCK_K, NUM_STAGES, _shrink_kernel
from multilora_kernels.segments import BLOCK_M_CHOICES, LARGE_BLOCK_M, RANK_PAGE, TILE_FIELDS

pytestmark = pytest.mark.skipif(
    triton is None or INTERPRETED, reason="needs Triton-lang's compiler, not its interpreter"
)


def ptx_for_sm90(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], num_warps: int, num_stages: int
) -> str:
    """PTX for arguments that are all divisible by 16, as they are at the shapes of real models."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def check_no_atomics(ptx: str) -> None:
    assert not re.search(r"\b(atom|red)\.", ptx), "results must not depend on scheduling"


TILE = {"TILE_FIELDS": TILE_FIELDS, "RANK_PAGE": RANK_PAGE}


@pytest.mark.parametrize("block_m", BLOCK_M_CHOICES)
@pytest.mark.parametrize("block_c", [16, 64])
def test_shrink_reads_wide_and_in_stages(block_m, block_c):
    pointers = {"x": "*bf16", "a": "*bf16", "h": "*bf16", "order": "*i32", "tiles": "*i32"}
    constants = {"BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_K": BLOCK_K[block_m], **TILE}
    ptx = ptx_for_sm90(_shrink_kernel, pointers, constants, num_warps=4, num_stages=NUM_STAGES)
    check_no_atomics(ptx)
    assert ("wgmma.mma_async" in ptx) == (block_m >= LARGE_BLOCK_M)
    assert re.search(r"cp\.async\.cg.*, 0x10", ptx), "x and A arrive 16 bytes at a time, while others are multiplied"
    assert not re.search(r"ld\.global[\w.]*\.b16", ptx), "nothing is read element by element"


@pytest.mark.parametrize("block_m", BLOCK_M_CHOICES)
@pytest.mark.parametrize("rank_block", [16, 32])
def test_expand_reads_and_writes_wide(block_m, rank_block):
    pointers = {"y": "*bf16", "h": "*bf16", "b": "*bf16", "order": "*i32", "tiles": "*i32"}
    constants = {"WIDTHS": (4096, 1024, 1024), "BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_R": rank_block, **TILE}
    ptx = ptx_for_sm90(_expand_kernel, pointers, constants, num_warps=4, num_stages=1)
    check_no_atomics(ptx)
    assert ("wgmma.mma_async" in ptx) == (block_m >= LARGE_BLOCK_M)
    assert not re.search(r"(ld|st)\.global[\w.]*\.b16", ptx), "nothing is read or written element by element"
    assert re.search(r"st\.global\.v4\.b32", ptx)


def test_copy_moves_sixteen_bytes_at_a_time():
    constants = {"SITE_FIELDS": 4, "MOVE_FIELDS": 3, "WORD_BYTES": 4, "ALIGNMENT": 16, "BLOCK_WORDS": 4096}
    ptx = ptx_for_sm90(_copy_kernel, {"addresses": "*i64", "moves": "*i32"}, constants, num_warps=8, num_stages=3)
    assert re.search(r"ld\.global\.v4\.b32", ptx)
    assert re.search(r"st\.global\.v4\.b32", ptx)
