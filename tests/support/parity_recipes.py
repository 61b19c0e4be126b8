# SPDX-License-Identifier: Apache-2.0
"""How PEFT makes the adapters of the parity suite."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

import expert_adapters
from extras_models import randomise
from parity_case import Case, plain
from parity_families import Family

IDS = torch.arange(60).remainder(53).view(4, 15)
"""What initialisations look at that want data."""
NEIGHBOURS: dict[str, dict[str, Any]] = {
    "beside-plain": {"r": 3},
    "beside-dora": {"use_dora": True, "r": 6},
    "beside-bias": {"lora_bias": True, "r": 20},
}
"""Who is in every batch, besides the base model."""


def save_neighbours(family: Family, base: Any, folder: Path) -> None:
    for seed, (name, fields) in enumerate(NEIGHBOURS.items(), 1000):
        _train(base, {**plain(family), **fields}, seed).save_pretrained(str(folder / name))


def save(case: Case, family: Family, base: Any, folder: Path, seed: int) -> None:
    """The adapter of a case for that model. `folder` holds those of others; NEIGHBOURS are there already."""
    if case.parts or case.verdict(family) == "n/a":
        return
    recipe = case.recipe or ("configured" if case.refused else "trained")
    model = base if not case.vocabulary else resized(base, case.vocabulary)
    own = case.config(family)
    _RECIPES[recipe](model, own if recipe == "edited" else {**plain(family), **own}, folder / case.name, seed)


def resized(base: Any, vocabulary: int) -> Any:
    """A copy with that many tokens."""
    model = copy.deepcopy(base)
    torch.manual_seed(vocabulary)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def _train(base: Any, fields: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    randomise(adapted, seed)
    return adapted


def _trained(base: Any, fields: dict[str, Any], folder: Path, seed: int) -> None:
    _train(base, fields, seed).save_pretrained(str(folder))


def _moved(adapted: Any, seed: int) -> None:
    """A and B as they were initialised, and some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def _eva(base: Any, fields: dict[str, Any], folder: Path, seed: int) -> None:
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    data = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    peft.initialize_lora_eva_weights(adapted, [data, data], show_progress_bar=False)
    _moved(adapted, seed)
    adapted.save_pretrained(str(folder))


def _converted(base: Any, fields: dict[str, Any], folder: Path, seed: int) -> None:
    """As PEFT's guides have it: the initial state is saved as a plain adapter, and the trained one relative to it."""
    model, config = copy.deepcopy(base), peft.LoraConfig(**fields)
    torch.manual_seed(seed)
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, run_model=lambda: model(input_ids=IDS[:1]))
    elif config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    adapted = peft.get_peft_model(model, config)
    init, config.init_lora_weights = config.init_lora_weights, True
    initial = folder.parent.parent / "initial" / folder.name
    adapted.save_pretrained(str(initial))
    config.init_lora_weights = init
    _moved(adapted, seed)
    adapted.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(initial))


def _beside(base: Any, fields: dict[str, Any], folder: Path, seed: int) -> None:
    """As trained, with the adapter as it was before in a folder of its own; PEFT makes the residual again."""
    config = peft.LoraConfig(**fields)
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    init, config.init_lora_weights = config.init_lora_weights, True
    adapted.save_pretrained(str(folder / f"{init}_init"))
    config.init_lora_weights = init
    _moved(adapted, seed)
    adapted.save_pretrained(str(folder))


def _former(base: Any, fields: dict[str, Any], folder: Path, seed: int) -> None:
    """With one linear for each expert."""
    folder.mkdir()
    expert_adapters.save_former(folder, sizes=expert_adapters.sizes_of(base), seed=seed, **fields)


def _configured(base: Any, fields: dict[str, Any], folder: Path, seed: int) -> None:
    """With PEFT's config of an adapter that is refused for it; the tensors are those of another one."""
    shutil.copytree(folder.parent / "beside-plain", folder)
    peft.LoraConfig(**fields).save_pretrained(str(folder))


def _edited(base: Any, fields: dict[str, Any], folder: Path, seed: int) -> None:
    """A neighbour's, with a config that this PEFT does not write, or not without further packages."""
    shutil.copytree(folder.parent / ("beside-dora" if fields.get("use_dora") else "beside-plain"), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


_RECIPES: dict[str, Callable[[Any, dict[str, Any], Path, int], None]] = {
    "trained": _trained,
    "eva": _eva,
    "converted": _converted,
    "beside": _beside,
    "former": _former,
    "configured": _configured,
    "edited": _edited,
}
