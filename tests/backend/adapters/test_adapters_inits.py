# SPDX-License-Identifier: Apache-2.0
"""Initialisations that take A and B out of the base model's weights: served when PEFT has converted them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import LlamaForCausalLM

from multilora_backend.adapters.peft import read_adapter
from multilora_backend.adapters.ranks import padded
from multilora_backend.errors import MultiloraError

EPS = torch.finfo(torch.float32).eps
IDS = torch.arange(30).remainder(29).view(2, 15)


def prepare_corda(model: LlamaForCausalLM, config: peft.LoraConfig) -> None:
    preprocess_corda(model, config, run_model=lambda: model(input_ids=IDS[:1]))


def prepare_loraga(model: LlamaForCausalLM, config: peft.LoraConfig) -> None:
    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())


Prepare = Callable[[LlamaForCausalLM, peft.LoraConfig], None]
INITS: dict[str, tuple[dict[str, Any], Prepare | None]] = {
    "pissa": ({"init_lora_weights": "pissa"}, None),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4", "alpha_pattern": {"up_proj": 5}}, None),
    "olora": ({"init_lora_weights": "olora", "rank_pattern": {"o_proj": 3}}, None),
    "corda": ({"init_lora_weights": "corda", "corda_config": CordaConfig()}, prepare_corda),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, prepare_loraga),
}


@pytest.mark.parametrize("name", INITS)
def test_what_peft_converts_is_served_and_what_it_does_not_is_refused(name, sites, llama, tmp_path: Path):
    fields, prepare = INITS[name]
    base, original = copy.deepcopy(llama), dict(llama.named_modules())
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj", "o_proj"], **fields)
    if prepare is not None:
        prepare(base, config)
    model = peft.get_peft_model(base, config)
    init = config.init_lora_weights
    config.init_lora_weights = True  # as PEFT's guides have it: the initial state is saved as a plain adapter
    model.save_pretrained(str(tmp_path / "initial"))
    config.init_lora_weights = init
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(MultiloraError, match=r"^init_lora_weights: .* changes the base model's weights; convert"):
        read_adapter(tmp_path / "raw", sites, torch.float32)
    model.save_pretrained(str(tmp_path / "done"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    weights = read_adapter(tmp_path / "done", sites, torch.float32)
    assert weights.rank == 8, "twice its own"
    for index, site in enumerate(sites):
        own = weights.sites[index]
        if own is None:
            continue
        deltas = own.a.view(len(site.modules), padded(weights.rank), -1)
        for module, a, b in zip(site.modules, deltas, own.b.split(site.out_features, 1), strict=True):
            if module.endswith(("up_proj", "o_proj")):
                trained = model.base_model.model.get_submodule(module)
                expected = trained.base_layer.weight + trained.get_delta_weight("default")
                ours = original[module].weight + b.T @ a
                # The residual and A B were rounded apart from each other when they were taken from the weight.
                assert (ours - expected).abs().max() <= 64 * EPS * expected.abs().max(), module
