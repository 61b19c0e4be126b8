# SPDX-License-Identifier: Apache-2.0
"""Adapters whose first A and B were taken out of the base model: as saved, as they began, and as PEFT converts them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

IDS = torch.arange(30).remainder(29).view(2, 15)


def prepare_corda(model: Any, config: peft.LoraConfig) -> None:
    preprocess_corda(model, config, run_model=lambda: model(input_ids=IDS[:1]))


def prepare_loraga(model: Any, config: peft.LoraConfig) -> None:
    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())


Prepare = Callable[[Any, peft.LoraConfig], None]
INITS: dict[str, tuple[dict[str, Any], Prepare | None]] = {
    "pissa": ({"init_lora_weights": "pissa"}, None),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4", "alpha_pattern": {"up_proj": 5}}, None),
    "olora": ({"init_lora_weights": "olora", "rank_pattern": {"o_proj": 3}}, None),
    "corda": ({"init_lora_weights": "corda", "corda_config": CordaConfig()}, prepare_corda),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, prepare_loraga),
}


def train(name: str, model: Any, folder: Path, convert: bool = True, **more: Any) -> Any:
    """Saves `initial`, `raw` and (if `convert`) `done` below `folder`; returns PEFT's model, on a copy of `model`."""
    fields, prepare = INITS[name]
    base = copy.deepcopy(model)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["up_proj", "o_proj"], **fields, **more})
    if prepare is not None:
        prepare(base, config)
    adapted = peft.get_peft_model(base, config)
    init = config.init_lora_weights
    config.init_lora_weights = True  # as PEFT's guides have it: the initial state is saved as a plain adapter
    adapted.save_pretrained(str(folder / "initial"))
    config.init_lora_weights = init
    torch.manual_seed(3)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder / "raw"))
    if convert:
        adapted.save_pretrained(str(folder / "done"), path_initial_model_for_weight_conversion=str(folder / "initial"))
    return adapted
