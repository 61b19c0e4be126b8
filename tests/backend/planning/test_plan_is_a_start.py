# SPDX-License-Identifier: Apache-2.0
"""`multilora plan` against engines that are really started: the same numbers, to the byte."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Phi3Config, Qwen2Config

import tiny_models
from multilora_backend.adapters.state import AdapterState
from multilora_backend.config import Config
from multilora_backend.engine.engine import Engine
from multilora_backend.errors import MultiloraError
from multilora_backend.models.loader import attention_modules
from multilora_backend.planning.plan import Plan, machine_of, make_plan

ADAPTERS = {
    "small": {"r": 3},
    "attention": {"r": 9, "target_modules": ["q_proj", "o_proj"]},
    "mixed": {"r": 4, "rank_pattern": {"layers.1.mlp.down_proj": 21}},
    "dora": {"r": 5, "use_dora": True},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    tiny_models.save_llama(root / "model")
    for seed, (name, lora) in enumerate(ADAPTERS.items()):
        tiny_models.save_adapter(root / "model", root / "adapters" / name, seed, **lora)
    broken = root / "adapters" / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    return root


def settings(root: Path, **more: object) -> Config:
    folders = {"model": str(root / "model"), "adapters": str(root / "adapters")}
    return Config(**{**folders, "device": "cpu", "block_size": 4, **more})


def allocated(engine: Engine) -> dict[str, int]:
    """What a running engine holds, by its tensors."""
    module, pool = engine.model.module, engine.adapters.pool
    tensors = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers()) if t.nbytes}
    found = {"weights and border": sum(tensors.values())}
    found["kv_cache"] = sum(layer.kv_cache.nbytes for layer in attention_modules(module))
    found["adapter_pool"] = sum(t.nbytes for t in (*pool.a, *pool.b)) if pool else 0
    found["adapter_extras"] = pool.extras.nbytes if pool else 0
    found["ranks"] = pool.num_ranks if pool else 0
    found["kv_pages"] = engine.pages.num_pages - 1
    found["kv_tokens"] = found["kv_pages"] * engine.config.block_size
    found["max_model_len"] = engine.model.max_model_len
    return found


def promised(plan: Plan) -> dict[str, int]:
    found = {"weights and border": plan.weights + plan.border}
    names = ("kv_cache", "adapter_pool", "adapter_extras", "ranks", "kv_pages", "kv_tokens", "max_model_len")
    return {**found, **{name: getattr(plan, name) for name in names}}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lora_strategy": "bordered", "adapter_device_bytes": 500_000},
        {"lora_strategy": "bordered", "dtype": "bfloat16"},
        {"kv_cache_bytes": 20_000, "adapter_device_bytes": 70_000, "adapter_extras_bytes": 12_345},
        {"adapters": ""},
    ],
)
def test_memory_is_what_the_engine_allocates(llama: Path, more: dict) -> None:
    config = settings(llama, **more)
    plan = make_plan(config, machine_of(config))
    engine = Engine(config, wake=lambda: None)
    try:
        assert promised(plan) == allocated(engine)
        assert (plan.border > 0) == (config.lora_strategy == "bordered")
    finally:
        engine.close()


FAMILIES = {
    "gemma2": (Gemma2Config, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}),
    "phi3": (Phi3Config, {"pad_token_id": 0, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tied_weights_biases_and_fused_modules_are_reckoned_right(name: str, tmp_path: Path) -> None:
    make, more = FAMILIES[name]
    shape = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 96,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    hf = make(**shape, **more)
    tiny_models.save_llama(tmp_path / "model")  # for its tokenizer
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hf).save_pretrained(tmp_path / "model")
    tiny_models.save_adapter(tmp_path / "model", tmp_path / "adapters" / "a", 0)
    config = settings(tmp_path, lora_strategy="bordered", adapter_device_bytes=300_000)
    plan = make_plan(config, machine_of(config))
    engine = Engine(config, wake=lambda: None)
    try:
        assert promised(plan) == allocated(engine)
    finally:
        engine.close()


def test_adapters_take_what_the_plan_says(llama: Path) -> None:
    config = settings(llama, adapter_device_bytes=400_000, adapter_extras_bytes=65_536)
    plan = make_plan(config, machine_of(config))
    engine = Engine(config, wake=lambda: None)
    try:
        for name in ADAPTERS:
            deadline = time.monotonic() + 20
            while engine.adapters.request(name) is not AdapterState.ACTIVE and time.monotonic() < deadline:
                engine.adapters.poll()
                time.sleep(0.005)
        taken = engine.adapters.stats()
        assert {each.name: each.rank for each in plan.served} == {"attention": 9, "dora": 5, "mixed": 21, "small": 3}
        assert sum(each.host_bytes for each in plan.served) == taken.bytes["host"][0]
        assert sum(each.device_bytes for each in plan.served) == taken.bytes["device"][0]
        assert sum(each.extras_bytes for each in plan.served) == engine.adapters._life.residency.extras_nbytes
        assert [each.name for each in plan.served if each.extras_bytes] == ["dora"]
        assert [each.name for each in plan.refused] == ["broken"]
        with pytest.raises(MultiloraError) as refused:
            engine.adapters.resolve("broken")
        assert plan.refused[0].reason in refused.value.message
    finally:
        engine.close()


def test_as_many_adapters_of_a_rank_fit_as_the_plan_says(llama: Path) -> None:
    config = settings(llama, adapter_device_bytes=400_000, adapter_extras_bytes=65_536)
    plan = make_plan(config, machine_of(config))
    engine = Engine(config, wake=lambda: None)
    try:
        for row in plan.by_rank:
            pool = engine.adapters.pool
            padded = -(-row.rank // 8) * 8
            assert row.device_fit == pool.num_ranks // padded
            assert row.device_bytes == padded * pool.bytes_per_rank
            assert row.device_fit * row.device_bytes <= plan.adapter_pool < (row.device_fit + 1) * row.device_bytes
    finally:
        engine.close()
    assert sum(row.registered for row in plan.by_rank) == len(plan.served)
    assert asdict(plan)["by_rank"][0]["rank"] == 3
