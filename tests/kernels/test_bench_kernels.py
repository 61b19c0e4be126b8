# SPDX-License-Identifier: Apache-2.0
"""The kernels' benchmark at a small model on the CPU, and its search with a planted best."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from multilora_kernels._triton import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter would take minutes")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return importlib.import_module("bench_kernels")


def test_every_op_is_measured_and_written(script, tmp_path):
    path = tmp_path / "kernels.json"
    assert script.main(["--batches", "1/1,5/2", "--ranks", "9", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["limits"].keys() == {"copy_gb_s", "matmul_tflop_s"}
    seen = {(row["op"], row["site"], row["adapters"]) for row in result["results"]}
    assert {op for op, *_ in seen} == set(script.OPS)
    assert {("rope_write", "", 0), ("rope_write", "qkv", 2), ("gated_activation", "gate_up", 1)} <= seen
    assert all(row["us"] > 0 and row["reference_us"] > 0 and row["gb_s"] > 0 for row in result["results"])


def test_no_case_starts_after_the_time_is_up(script, tmp_path, capsys):
    assert script.main(["--seconds", "0", "--json", str(tmp_path / "k.json")]) == 0
    assert json.loads((tmp_path / "k.json").read_text())["results"] == []
    assert "stopped after 0 s, before grouped_shrink qkv 1/1" in capsys.readouterr().out


def test_bytes_are_those_that_have_to_move(script):
    maker = script.Maker(script.LLAMA_8B, "meta", torch.bfloat16, 0)
    batch = script.Batch(32, 4, 16)
    shrink, expand = maker.grouped_shrink(batch, "qkv"), maker.grouped_expand(batch, "o")
    assert shrink.bytes == 2 * (32 * 4096 + 4 * 3 * 16 * 4096 + 32 * 3 * 16)
    assert shrink.flops == 2 * 32 * 4096 * 3 * 16
    assert expand.bytes == 2 * (2 * 32 * 4096 + 4 * 16 * 4096 + 32 * 16)
    assert maker.gated_activation(script.Batch(32, 0, 0)).bytes == 2 * 3 * 32 * 14336


def test_the_search_finds_a_planted_best_and_leaves_the_constants_alone(script):
    tuning = importlib.import_module("kernel_tuning")
    kernel = importlib.import_module("multilora_kernels.grouped_shrink")
    before = {name: value for name, value in vars(kernel).items() if name.isupper()}
    case = script.Maker(script.SMALL, "cpu", torch.float32, 0).grouped_shrink(script.Batch(5, 2, 9), "qkv")

    def seconds(case, block_m):
        blocks = kernel.blocks_for(block_m, 3, 5, 2, 2**20)  # what the launcher asks
        return 1 + abs(block_m - 32) + abs(blocks.k - 128) + abs(kernel.NUM_WARPS - 8)

    tuned = tuning.tune(case, 16, seconds)
    best = dict(tuned.best)
    blocks = best.pop("ONE_SLICE SLICES SLICES_MANY_ROWS")
    assert best == {"block_m": 32, "SPLIT NUM_WARPS": 8}
    assert [block.k for block in blocks] == [128] * 3
    assert tuned.seconds[()] == 1 + 16 + 384 + 4
    assert {name: value for name, value in vars(kernel).items() if name.isupper()} == before


def test_constants_are_searched_together_or_each_with_its_own_value(script):
    tuning = importlib.import_module("kernel_tuning")
    kernel = importlib.import_module("multilora_kernels.activation")
    before = kernel.BLOCK_N, kernel.NUM_WARPS
    with tuning.constants(kernel, {"BLOCK_N NUM_WARPS": (64, 2)}):
        assert (kernel.BLOCK_N, kernel.NUM_WARPS) == (64, 2)
    with tuning.constants(kernel, {"BLOCK_N NUM_WARPS": 8}):
        assert (kernel.BLOCK_N, kernel.NUM_WARPS) == (8, 8)
    assert before == (kernel.BLOCK_N, kernel.NUM_WARPS)


def test_empty_tiles_are_added_as_in_a_captured_graph(script):
    case = script.Maker(script.SMALL, "cpu", torch.float32, 0).grouped_expand(script.Batch(5, 2, 9), "o")
    assert [len(script.Clock("cpu", 0, tiles)._segments(case, 16).tiles) for tiles in (0, 7)] == [2, 7]


def test_every_constant_that_is_searched_exists(script):
    tuning = importlib.import_module("kernel_tuning")
    for table in (tuning.CHOICES, tuning.CHOICES_WITHOUT_LORA):
        for op, choices in table.items():
            module = importlib.import_module(f"multilora_kernels.{tuning.FILES.get(op, op)}")
            for names in choices.keys() - {tuning.BLOCK_M}:
                assert all(hasattr(module, name) for name in names.split()), (op, names)
