# SPDX-License-Identifier: Apache-2.0
"""Adapters of whole models, mixed in ragged steps, give the logits of transformers with peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from multilora_backend.adapters.peft import read_adapter
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import padded
from multilora_backend.config import Config
from multilora_backend.core import Slot
from multilora_backend.models.fusion import linears
from multilora_backend.models.loader import attach_kv_cache, load_model
from multilora_backend.models.strategies import STRATEGIES, create_strategy
from ragged_steps import PAGE, logits_of_step, sequence

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.6,
        "logits_scaling": 1.7,
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
DENSE: dict[str, dict[str, Any]] = {
    "seven": {"target_modules": SEVEN},
    "patterns": {
        "target_modules": SEVEN,
        "rank_pattern": {"q_proj": 2, "down_proj": 11, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"o_proj": 3, "layers.0.mlp.gate_proj": 20},
    },
    "rslora": {"target_modules": ["k_proj", "up_proj"], "use_rslora": True, "r": 9},
    "one layer": {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": 1, "r": 1},
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SPARSE: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "everything": {"target_modules": "all-linear"},
    "experts": {"target_modules": [], "target_parameters": EXPERTS, "r": 9},
    "patterns": {
        "target_modules": ATTENTION,
        "target_parameters": [*EXPERTS, "gate.weight"],
        "rank_pattern": {"q_proj": 2, "experts.gate_up_proj": 3, "layers.1.mlp.experts.down_proj": 11},
        "alpha_pattern": {"o_proj": 3, r".*\.0\..*down_proj": 20, "gate.weight": 2},
        "use_rslora": True,
    },
    "down alone": {"target_modules": ["o_proj"], "target_parameters": ["down_proj"], "layers_to_transform": 1},
    "router alone": {"target_modules": [], "target_parameters": ["model.layers.1.mlp.gate.weight"], "r": 1},
}
ADAPTERS = {"llama": DENSE, "granite": DENSE, "mixtral": SPARSE, "qwen3_moe": SPARSE}


def save_model(folder: Path, family: str) -> Path:
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # norms at 1 and biases at 0 would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def adapted(model: Path, folder: Path, seed: int, **lora: Any) -> Any:
    """transformers with a random adapter of peft, which is also saved."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(seed)
    module = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **lora}))
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    module.save_pretrained(folder)
    return module.eval()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_adapters_give_pefts_logits(tmp_path: Path, family: str, strategy: str):
    folder = save_model(tmp_path / "model", family)
    model = load_model(Config(model=str(folder), device="cpu", block_size=PAGE))
    attach_kv_cache(model.module, 60, PAGE, model.device)
    judges = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()]
    pool = DevicePool(model.sites, 2**28, torch.float32, "cpu", max_ranks=256)
    for tensor in [*pool.a, *pool.b]:
        tensor.fill_(torch.nan)  # what nobody owns may hold anything
    start = 8
    for slot, (name, lora) in enumerate(ADAPTERS[family].items()):
        judges.append(adapted(folder, tmp_path / name, slot, **lora))
        weights = read_adapter(tmp_path / name, model.sites, torch.float32)
        pool.write(weights, slot, start)
        start += padded(weights.rank) + 8
    lora = create_strategy(strategy, linears(model.module), pool)

    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 61, (5 + 3 * i % 17,), generator=generator).tolist() for i in range(len(judges) + 1)]
    owners = [i % len(judges) for i in range(len(tokens))]
    with torch.inference_mode():
        expected = [judges[j](input_ids=torch.tensor([t])).logits[0] for j, t in zip(owners, tokens, strict=True)]
        plain = [judges[0](input_ids=torch.tensor([t])).logits[0] for t in tokens]
    for j, own, base in zip(owners, expected, plain, strict=True):
        assert (j == 0) == torch.equal(own, base), "every adapter matters"
    sequences = [
        sequence(i, t, list(range(1 + 6 * i, 7 + 6 * i)), adapter=j - 1)
        for i, (j, t) in enumerate(zip(owners, tokens, strict=True))
    ]
    steps: list[list[Slot]] = [[], [], [], []]
    for i, s in enumerate(sequences):  # two chunks each, at different times, then all of them decode
        length, cut = len(tokens[i]), len(tokens[i]) // 2
        steps[i % 2].append(Slot(s, 0, cut, True))
        steps[i % 2 + 1].append(Slot(s, cut, length - cut - 1, True))
        steps[3].append(Slot(s, length - 1, 1, True))
    for slots in steps:
        got = logits_of_step(model, slots, lora)
        rows = torch.cat([expected[slot.sequence.key[1]][slot.start :][: slot.count] for slot in slots])
        assert (got - rows).abs().max() <= 1e-5 * rows.abs().max()
