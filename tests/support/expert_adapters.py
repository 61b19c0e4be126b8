# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts, and PEFT's changes of their parameters to compare an adapter's layout with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
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
