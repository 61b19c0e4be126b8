# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts, and PEFT's changes of their parameters to compare an adapter's layout with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.adapters.ranks import padded
from multilora_backend.core import LoraSite
from multilora_backend.errors import MultiloraError
from multilora_backend.models.fusion import fuse

EXPERTS, HIDDEN, MIDDLE, LAYERS = 5, 24, 12, 2


def model(family: str = "mixtral") -> Any:
    settings = {"vocab_size": 31, "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": LAYERS}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS}
    if family == "qwen3_moe":
        more |= {"moe_intermediate_size": MIDDLE, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **more))


def sites_of(family: str = "mixtral", experts: bool = True) -> list[LoraSite]:
    with torch.device("meta"):
        return fuse(model(family), experts)


def deltas_of(adapted: Any) -> dict[str, torch.Tensor]:
    deltas = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            key = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            deltas[key] = module.get_delta_weight("default").detach()
    return deltas


def check_deltas(folder: Path, expected: dict[str, torch.Tensor], sites: list[LoraSite]) -> None:
    assert expected
    weights = read_adapter(folder, sites, torch.float32)
    size = padded(weights.rank)
    for site, ours in zip(sites, weights.sites, strict=True):
        if not site.parameter:
            continue
        assert (ours is None) == (site.parameter not in expected)
        if ours is None:
            continue
        copies = max(site.experts, 1)
        a, b = ours.a.view(copies, size, site.in_features), ours.b.view(copies, size, site.width)
        assert not a[:, weights.rank :].any()
        assert not b[:, weights.rank :].any()
        delta = expected[site.parameter].view(copies, site.width, site.in_features)
        # A rank-long sum in another order.
        bound = torch.finfo(torch.float32).eps * (weights.rank + 2) * (b.abs().mT @ a.abs())
        assert ((b.mT @ a - delta).abs() <= bound).all(), site.key


def refused(folder: Path, sites: list[LoraSite], match: str) -> None:
    with pytest.raises(MultiloraError, match=match):
        read_adapter(folder, sites, torch.float32)
    with pytest.raises(MultiloraError, match=match):
        check_adapter(folder, sites)


@dataclass(frozen=True)
class Sizes:
    family: str = "mixtral"
    experts: int = EXPERTS
    hidden: int = HIDDEN
    middle: int = MIDDLE


MIXTRAL = Sizes()


def sizes_of(model: Any) -> Sizes:
    """Of any mixture of experts."""
    experts, hidden, middle = model.model.layers[0].mlp.experts.down_proj.shape
    return Sizes(model.config.model_type, experts, hidden, middle)


FORMER = {
    "mixtral": ("block_sparse_moe", {name: name for name in ("w1", "w2", "w3", "gate")}),
    "qwen3_moe": ("mlp", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "gate": "gate"}),
}
"""Where experts were linears in transformers 4, and which."""


def save_former(
    folder: Path, target_modules: list[str], r: int = 3, sizes: Sizes = MIXTRAL, seed: int = 2, **fields: Any
) -> Path:
    """An adapter as it was saved with transformers 4."""
    torch.manual_seed(seed)
    tensors = {}
    block, names = FORMER[sizes.family]
    for layer in range(LAYERS):
        for name in target_modules:
            shapes = {"w2": (sizes.hidden, sizes.middle), "gate": (sizes.experts, sizes.hidden)}
            rows, columns = shapes.get(names[name], (sizes.middle, sizes.hidden))
            for expert in ("",) if name == "gate" else (f"experts.{i}." for i in range(sizes.experts)):
                module = f"base_model.model.model.layers.{layer}.{block}.{expert}{name}"
                tensors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(r, columns)
                tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(rows, r)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 5, "target_modules": target_modules, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
