# SPDX-License-Identifier: Apache-2.0
"""The kernels through Triton's compiler for Hopper, which needs no GPU: what the interpreter cannot see."""

from __future__ import annotations

import re
from typing import Any

import pytest

from multilora_kernels._triton import INTERPRETED, triton
from multilora_kernels.grouped_expand import _expand_kernel
from multilora_kernels.grouped_shrink import _shrink_kernel

pytestmark = pytest.mark.skipif(
    triton is None or INTERPRETED, reason="needs Triton-lang's compiler, not its interpreter"
)


def ptx_for_sm90(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], num_stages: int) -> str:
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
    options = {"num_warps": 4, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def check(ptx: str, block_m: int) -> None:
    assert ("wgmma.mma_async" in ptx) == (block_m >= 64)
    assert not re.search(r"\b(atom|red)\.", ptx), "no atomics: results must not depend on scheduling"
    assert re.search(r"cp\.async\.cg.*, 0x10", ptx), "x and the weights are read 16 bytes at a time"
    assert not re.search(r"ld\.global[\w.]*\.b16", ptx), "nothing is read element by element"


@pytest.mark.parametrize("block_m", [16, 64])
def test_shrink_compiles_to_wide_loads_and_no_atomics(block_m):
    pointers = {"x": "*bf16", "a": "*bf16", "h": "*bf16", "order": "*i32", "tiles": "*i32"}
    constants = {"SLICES": 3, "BLOCK_M": block_m, "BLOCK_R": 16, "BLOCK_K": 128}
    check(ptx_for_sm90(_shrink_kernel, pointers, constants, num_stages=3), block_m)


@pytest.mark.parametrize("block_m", [16, 64])
def test_expand_compiles_to_wide_loads_and_no_atomics(block_m):
    pointers = {"y": "*bf16", "h": "*bf16", "b": "*bf16", "order": "*i32", "tiles": "*i32"}
    constants = {"WIDTHS": (4096, 1024, 1024), "SPLITS": 1, "BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_R": 16}
    check(ptx_for_sm90(_expand_kernel, pointers, constants, num_stages=2), block_m)
