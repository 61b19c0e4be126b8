# SPDX-License-Identifier: Apache-2.0
"""`multilora plan` for devices that are not here, and as a user sees it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from multilora_backend import cli
from multilora_backend.config import Config
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.planning import plan as planning
from multilora_backend.planning.plan import machine_of, make_plan
from multilora_backend.planning.sizes import parse_size, size

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = {"model": str(ROOT / "examples/tiny/model"), "adapters": str(ROOT / "examples/tiny/adapters")}
GIB = 2**30
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """A folder with the shapes of Llama-3.1-8B, and a header without tensors in place of 16 GB."""
    LlamaConfig(**LLAMA_8B, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    return tmp_path


def on_cuda(folder: Path, gib: int, **more: object):
    config = Config(model=str(folder), adapters=str(folder / "adapters"), **more)
    return make_plan(config, machine_of(config, gib * GIB))


def test_an_8b_model_on_80_gib(llama_8b: Path) -> None:
    """By hand: 8.03e9 bf16 weights; a rank is 2 x 2,621,440 bytes; 131,072 bytes of K and V a token."""
    plan = on_cuda(llama_8b, 80)
    assert plan.device == "cuda"
    assert plan.dtype == "bfloat16"
    assert plan.weights - 16_060_522_496 == 2 * 64 * 4, "the rotary frequencies"
    assert plan.bytes_per_token == 131_072
    bytes_per_rank = 2 * 32 * (3 * 4096 + 6144 + 4096 + 4096 + 2 * 4096 + 2 * 14336 + 14336 + 4096)
    assert plan.ranks == (80 * GIB // 12 - 16 * 2**20) // bytes_per_rank // 8 * 8
    assert plan.border == 1024 * 2 * 32 * (3 * 4096 + 4096 + 2 * 4096 + 14336)
    [row] = [row for row in plan.by_rank if row.rank == 16]
    assert row.device_bytes == 16 * bytes_per_rank
    assert row.device_fit == plan.ranks // 16
    assert plan.adapter_extras == (80 * GIB // 12) // 16 // 16 * 16
    whole, of_adapters = 80 * GIB, plan.adapter_pool + plan.adapter_extras + plan.border
    assert plan.kv_cache + plan.unassigned + plan.cuda_graphs + plan.weights + of_adapters == (
        whole - planning.CUDA_CONTEXT_BYTES
    )
    # gpu_memory_utilization leaves a tenth alone, and less than a page is lost.
    assert 0 <= plan.unassigned - whole // 10 < plan.bytes_per_token * 16 + 8
    assert plan.kv_tokens == plan.kv_pages * 16 == (plan.kv_cache // plan.bytes_per_token) - 16


def test_without_adapters_their_memory_is_kv_cache(llama_8b: Path) -> None:
    config = Config(model=str(llama_8b))
    without, with_ = make_plan(config, machine_of(config, 80 * GIB)), on_cuda(llama_8b, 80)
    assert (without.adapter_pool, without.border, without.ranks, without.by_rank) == (0, 0, 0, ())
    assert without.adapter_extras == 0
    gained = without.kv_cache - with_.kv_cache - with_.adapter_pool - with_.adapter_extras - with_.border
    assert abs(gained) <= 16 * without.bytes_per_token


def test_on_cuda_the_staging_buffer_comes_out_of_the_pools_budget(llama_8b: Path) -> None:
    pages = 10 * 8 * 5_242_880
    plan = on_cuda(llama_8b, 80, adapter_device_bytes=pages)
    assert (plan.ranks, plan.adapter_pool) == (72, 9 * 8 * 5_242_880 + 16 * 2**20)
    assert on_cuda(llama_8b, 80, adapter_device_bytes=pages + 16 * 2**20).ranks == 80


def test_adapters_of_one_rank_share_a_row(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(Path(EXAMPLE["adapters"]) / ("upper" if name == "three" else "sort"), tmp_path / name)
    config = Config(model=EXAMPLE["model"], adapters=str(tmp_path), device="cpu")
    plan = make_plan(config, machine_of(config))
    ranks = {each.name: each.rank for each in plan.served}
    assert {row.rank: row.registered for row in plan.by_rank if row.registered} == {
        ranks["one"]: 2,
        ranks["three"]: 1,
    }


@pytest.mark.parametrize(
    ("gib", "more", "problem"),
    [
        (20, {}, "kv_cache_bytes: must be at least 4194304 (two pages), got -"),
        (24, {"kv_cache_bytes": 20 * GIB}, f"kv_cache_bytes: {20 * GIB} are "),
        (80, {}, ""),
    ],
)
def test_a_model_that_does_not_fit_is_a_plan_with_a_problem(llama_8b: Path, gib: int, more: dict, problem: str) -> None:
    plan = on_cuda(llama_8b, gib, **more)
    assert plan.problem.startswith(problem)
    assert bool(plan.problem) == bool(problem)


def test_the_example_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [word for name, value in EXAMPLE.items() for word in (f"--{name}", value)]
    assert cli.main(["plan", *arguments, "--set", "device=cpu", "--set", "max_loras=3"]) == 0
    output = capsys.readouterr().out
    assert "KV cache       256.0 MiB   131,056 tokens of 2.0 KiB" in output
    assert "6 adapters have 64 ranks of the pool's 4,096" in output
    assert "At most 3 of them share a step (max_loras)." in output
    assert "border" not in output, "no row for what takes nothing"


def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [word for name, value in EXAMPLE.items() for word in (f"--{name}", value)]
    assert cli.main(["plan", *arguments, "--device-memory", "1GiB", "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["device_bytes"] == GIB
    assert plan["problem"].startswith("kv_cache_bytes: must be at least")
    assert {each["name"]: each["rank"] for each in plan["adapters"]}["upper"]
    assert sum(row["registered"] for row in plan["by_rank"]) == len(plan["adapters"]) == 6


def test_adapters_that_cannot_be_served_are_named(llama_8b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(Path(EXAMPLE["adapters"]) / "upper", llama_8b / "adapters" / "broken")
    (broken / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    arguments = ["--model", str(llama_8b), "--adapters", str(llama_8b / "adapters")]
    assert cli.main(["plan", *arguments, "--device-memory", "80 GiB"]) == 0
    assert "Not counted: broken: peft_type: only 'LORA' is supported, got 'IA3'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such"], "model: /no/such holds no config.json"),
        (["--set", "model=/no/such"], "model: /no/such holds no config.json"),
        (["--set", "device=cpu", "--device-memory", "8GiB"], "device-memory: is a CUDA device's, and device is cpu"),
        (["--set", "nonsense=1"], "settings: unknown key 'nonsense'"),
        (["--model", EXAMPLE["model"], "--adapters", "/no/such"], "/no/such"),
        (
            ["--model", EXAMPLE["model"], "--adapters", EXAMPLE["adapters"], "--set", "adapter_device_bytes=9"],
            "adapter_device_bytes: must be at least 311296 for 8 ranks, got 9",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 1
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1


def test_a_model_without_weights_is_refused(llama_8b: Path) -> None:
    (llama_8b / "model.safetensors").unlink()
    with pytest.raises(MultiloraError, match=r"holds no model\.safetensors") as refused:
        on_cuda(llama_8b, 80)
    assert refused.value.code is ErrorCode.INVALID_ARG


def test_weights_in_several_files_are_those_of_the_index(llama_8b: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "other.safetensors"):
        (llama_8b / name).write_bytes((2).to_bytes(8, "little") + b"{}")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (llama_8b / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = llama_8b / "model.safetensors"
    assert on_cuda(llama_8b, 80).stored_weights == whole.stat().st_size, "as transformers has it"
    whole.unlink()
    assert on_cuda(llama_8b, 80).stored_weights == 20


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("80GiB", 80 * GIB), ("80 gb", 80 * 10**9), (" 1.5k", 1500), ("0.5 Mi", 2**19), ("2T", 2 * 10**12)],
)
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "0", "0.4", "-1", "1e9", "80GiBs", "80 Pi", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size such as 80GiB"):
        parse_size(text)


@given(st.integers(1, 2**50))
def test_a_size_is_read_back_as_it_was_shown(count: int) -> None:
    assert abs(parse_size(size(count)) - count) <= 1 + 0.05 * 1024 ** max(0, (count.bit_length() - 1) // 10)
