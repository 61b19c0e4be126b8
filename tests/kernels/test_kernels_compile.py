# SPDX-License-Identifier: Apache-2.0
"""The kernels through Triton's compiler for Hopper, which needs no GPU: what the interpreter cannot see."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from multilora_kernels import activation, rope
from multilora_kernels._triton import INTERPRETED, triton
from multilora_kernels.activation import _activation_kernel
from multilora_kernels.copy_blocks import _copy_kernel
from multilora_kernels.grouped_expand import PASSES, _expand_kernel
from multilora_kernels.grouped_shrink import NUM_WARPS as SHRINK_WARPS
from multilora_kernels.grouped_shrink import SPLIT, _shrink_kernel, blocks_for
from multilora_kernels.rope_kernel import rope_kernel
from multilora_kernels.row_affine import NUM_WARPS, UNIT, _affine_kernel, block_n_for
from multilora_kernels.segments import RANK_PAGE, TILE_FIELDS, TILE_SLOT
from multilora_kernels.variants import BLOCK_M_CHOICES, LARGE_BLOCK_M, Passes

pytestmark = pytest.mark.skipif(
    triton is None or INTERPRETED, reason="needs Triton-lang's compiler, not its interpreter"
)
TILE = {"TILE_FIELDS": TILE_FIELDS, "RANK_PAGE": RANK_PAGE}
FEW = (16, 0)
BLOCKS = [(m, FEW) for m in (16, 32, 64)] + [(16, (16, 16)), (16, (32, 32))]
BLOCKS += [(m, (32, 16)) for m in BLOCK_M_CHOICES]
"""BLOCK_M, (BLOCK_R, MORE_R)."""


def compile_for_sm90(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    """Assembly by kind, "ptx" and "sass", at the shapes of real models: pointers and integers are divisible by 16.

    `types` by argument, i32 where it names none; `constants` are fixed when the kernel is compiled.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name] not in ("constexpr", "fp32")
        },
    )
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    ptx = asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx), "results must not depend on scheduling"
    assert not re.search(r"ld\.global[\w.]*\.b16", ptx), "nothing is read element by element"
    return asm


def most_registers(passes: Sequence[Passes], block_m: int, ranks: tuple[int, int]) -> int | None:
    """The smallest limit that a launcher sets for these."""
    limits = [some.registers[block_m] for some in passes if some[:2] == ranks and block_m in some.registers]
    return min(limits, default=None)


def check_writes_wide(ptx: str) -> None:
    assert not re.search(r"st\.global[\w.]*\.b16", ptx), "nothing is written element by element"
    assert re.search(r"st\.global\.v4\.b32", ptx)


def wide_loads_before_the_first_wait(asm: Any) -> int:
    """In machine code, where the assembler has chosen the order: before a value of any load goes to shared memory."""
    return len(re.findall(r"LDG\.E\.128", re.split(r"\bSTSM?\b", asm["sass"])[0]))


@pytest.mark.parametrize("block_m", BLOCK_M_CHOICES)
@pytest.mark.parametrize("slices", [1, 3])
def test_shrink_reads_wide_and_in_stages(block_m, slices):
    types = {"x": "*bf16", "a": "*bf16", "h": "*bf16", "rows": "*i32", "tiles": "*i32"}
    c, k, stages = blocks_for(block_m, slices, 5, 2, 227 * 1024)
    constants = {"BLOCK_M": block_m, "BLOCK_C": c, "BLOCK_K": k, "SPLIT": SPLIT, **TILE}
    ptx = compile_for_sm90(_shrink_kernel, types, constants, num_warps=SHRINK_WARPS, num_stages=stages)["ptx"]
    # A warp sums k / SPLIT columns at a time by itself, 16 with an instruction: the longest chain that it waits for.
    assert ptx.count("mma.sync") == k // SPLIT // 16 * (block_m // 16) * (c // 8)
    assert re.search(r"cp\.async\.cg.*, 0x10", ptx), "x and A arrive 16 bytes at a time, while others are multiplied"


@pytest.mark.parametrize("block_m", BLOCK_M_CHOICES)
@pytest.mark.parametrize("ranks", sorted({passes[:2] for passes in PASSES}))
def test_expand_reads_and_writes_wide(block_m, ranks):
    types = {"y": "*bf16", "h": "*bf16", "b": "*bf16", "rows": "*i32", "tiles": "*i32"}
    constants = {"WIDTHS": (4096, 1024, 1024), "BLOCK_M": block_m, "BLOCK_N": 128}
    constants |= {"BLOCK_R": ranks[0], "MORE_R": ranks[1], **TILE}
    options = {"num_warps": 4, "num_stages": 1, "maxnreg": most_registers(PASSES, block_m, ranks)}
    ptx = compile_for_sm90(_expand_kernel, types, constants, **options)["ptx"]
    assert ("wgmma.mma_async" in ptx) == (block_m >= LARGE_BLOCK_M)
    check_writes_wide(ptx)


@pytest.mark.parametrize("block_m", BLOCK_M_CHOICES)
def test_affine_reads_and_writes_wide(block_m):
    types = {"y": "*bf16", "values": "*fp32"} | dict.fromkeys(("offsets", "rows", "tiles"), "*i32")
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n_for(block_m)}
    constants |= {"TILE_FIELDS": TILE_FIELDS, "TILE_SLOT": TILE_SLOT, "UNIT": UNIT}
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    ptx = compile_for_sm90(_affine_kernel, types, constants, **options)["ptx"]
    check_writes_wide(ptx)
    # Two of y, then gain and shift, whose addresses are multiples of 16 bytes when the width is.
    assert ptx.count("ld.global.v4.b32") >= 4


def test_copy_moves_sixteen_bytes_at_a_time():
    constants = {"SITE_FIELDS": 4, "MOVE_FIELDS": 3, "WORD_BYTES": 4, "ALIGNMENT": 16, "BLOCK_WORDS": 4096}
    ptx = compile_for_sm90(_copy_kernel, {"addresses": "*i64", "moves": "*i32"}, constants, num_warps=8)["ptx"]
    assert re.search(r"ld\.global\.v4\.b32", ptx)
    assert re.search(r"st\.global\.v4\.b32", ptx)


def compile_activation(block_m: int, ranks: tuple[int, int]) -> Any:
    """Without LoRA at block_m 1."""
    with_delta, large = block_m > 1, block_m >= LARGE_BLOCK_M
    types = {"gate_up": "*bf16", "out": "*bf16", "h": "*bf16", "b": "*bf16", "rows": "*i32", "tiles": "*i32"}
    none = {} if with_delta else dict.fromkeys(("h", "b", "rows", "tiles", "stride_h", "stride_b"))
    block_n, num_warps = activation.BLOCK_N, activation.NUM_WARPS
    if with_delta:
        block_n = activation.BLOCK_N_DELTA
        num_warps = activation.NUM_WARPS_LARGE_M if large else activation.NUM_WARPS_SMALL_M
    constants = {
        "KIND": "silu",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_R": ranks[0],
        "MORE_R": ranks[1],
        **TILE,
        **none,
    }
    options = {"num_warps": num_warps, "num_stages": activation.NUM_STAGES, "enable_fp_fusion": False}
    options["maxnreg"] = most_registers(activation.PASSES, block_m, ranks)
    return compile_for_sm90(_activation_kernel, types, constants, **options)


def test_activation_without_delta_reads_and_writes_wide():
    ptx = compile_activation(1, FEW)["ptx"]
    assert ptx.count("ld.global.v4.b32") == 2, "one of gate and one of up a thread"
    assert ptx.count("ld.global") == 2
    assert ptx.count("st.global.v4.b32") == ptx.count("st.global") == 1


@pytest.mark.parametrize(("block_m", "ranks"), BLOCKS)
def test_activation_with_delta_reads_wide(block_m, ranks):
    asm = compile_activation(block_m, ranks)
    check_writes_wide(asm["ptx"])
    assert ("wgmma.mma_async" in asm["ptx"]) == (block_m >= LARGE_BLOCK_M)
    if (block_m, ranks) == (16, FEW):
        assert wide_loads_before_the_first_wait(asm) == 8, "two each of gate, up and their B"


def compile_rope(block_m: int, ranks: tuple[int, int], d: int, rotary: int, norm: bool) -> Any:
    """Without LoRA at block_m 1."""
    with_delta, large = block_m > 1, block_m >= LARGE_BLOCK_M
    pointers = ("qkv", "cos", "sin", "q", "kv_cache", "q_norm", "k_norm", "h", "b")
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(("slots", "rows", "tiles"), "*i32") | {"eps": "fp32"}
    none = [] if with_delta else ["h", "b", "rows", "tiles", "stride_h", "stride_b"]
    none += [] if norm else ["q_norm", "k_norm"]
    heads, half, rest = rope.blocks_for(32, 8, d, rotary, with_delta, rope.VALUES_PER_PROGRAM)[1:]
    constants = {
        "HEADS": 32, "KV_HEADS": 8, "PAGE_SIZE": 16, "D": d, "R": rotary, "GEMMA": False, "BLOCK_HEADS": heads,
        "BLOCK_M": block_m, "BLOCK_R": ranks[0], "MORE_R": ranks[1], "BLOCK_HALF": half, "BLOCK_REST": rest,
        **TILE, **dict.fromkeys(none),
    }  # fmt: skip
    num_warps = rope.NUM_WARPS
    if with_delta:
        num_warps = rope.NUM_WARPS_LARGE_M if large else rope.NUM_WARPS_SMALL_M
    options = {"num_warps": num_warps, "num_stages": rope.NUM_STAGES, "enable_fp_fusion": False}
    options["maxnreg"] = most_registers(rope.PASSES, block_m, ranks)
    return compile_for_sm90(rope_kernel, types, constants, **options)


@pytest.mark.parametrize(("d", "rotary"), [(64, 64), (128, 128), (256, 256), (128, 96)])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_without_delta_waits_for_no_load_before_the_next(d, rotary, norm):
    ptx = compile_rope(1, FEW, d, rotary, norm)["ptx"]
    assert ptx.count("ld.global.v4.b32") >= 6, "x, cos and sin"
    assert ptx.count("ld.global.b32") <= 2, "the slot"
    assert "bar.sync" not in ptx
    check_writes_wide(ptx)


@pytest.mark.parametrize(("block_m", "ranks"), BLOCKS)
@pytest.mark.parametrize(("d", "rotary", "norm"), [(128, 128, False), (128, 96, True)])
def test_rope_with_delta_reads_wide(block_m, ranks, d, rotary, norm):
    asm = compile_rope(block_m, ranks, d, rotary, norm)
    check_writes_wide(asm["ptx"])
    assert ("wgmma.mma_async" in asm["ptx"]) == (block_m >= LARGE_BLOCK_M)
    if (block_m, ranks, norm) == (16, FEW, False):
        assert wide_loads_before_the_first_wait(asm) == 8, "two each of x, B, cos and sin"
