# SPDX-License-Identifier: Apache-2.0
"""Norms, embeddings, heads and tokens: what an adapter has of them on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from extras_models import save_trained
from multilora_backend.adapters.base import EMBEDDING, HEAD
from multilora_backend.adapters.extras import AFFINE, LORA_A, LORA_B, ROWS, TOKENS, WEIGHT, extra_keys
from multilora_backend.adapters.peft import check_adapter, read_adapter

VOCABULARY, HIDDEN = 31, 32
Q = ["q_proj"]
TABLES = ["embed_tokens", "lm_head"]


def test_the_base_model_is_told_in_transformers_names(models):
    _, base = models[False]
    layer = {"input_layernorm", "post_attention_layernorm"}
    assert set(base.norms) == {"model.norm", *(f"model.layers.{i}.{name}" for i in range(2) for name in layer)}
    assert base.embedding.shape == base.head.shape == (VOCABULARY, HIDDEN)
    assert not base.tied
    assert models[True][1].tied


SHAPES: dict[str, tuple[dict[str, Any], dict[tuple[str, str], tuple[int, ...]]]] = {
    "norm": ({"modules_to_save": ["model.norm"]}, {(WEIGHT, "model.norm"): (HIDDEN,)}),
    "head": ({"modules_to_save": ["lm_head"]}, {(WEIGHT, HEAD): (VOCABULARY, HIDDEN)}),
    "lora on both": (
        {"target_modules": TABLES, "r": 3},
        {
            (LORA_A, EMBEDDING): (VOCABULARY, 3),
            (LORA_B, EMBEDDING): (3, HIDDEN),
            (LORA_A, HEAD): (3, HIDDEN),
            (LORA_B, HEAD): (VOCABULARY, 3),
        },
    ),
    "dora": (
        {"target_modules": ["embed_tokens"], "r": 3, "use_dora": True},
        {(LORA_A, EMBEDDING): (VOCABULARY, 3), (LORA_B, EMBEDDING): (3, HIDDEN), (AFFINE, EMBEDDING): (2, HIDDEN)},
    ),
    "tokens": (
        {"trainable_token_indices": [4, 2]},
        {(TOKENS, EMBEDDING): (2,), (ROWS, EMBEDDING): (2, HIDDEN)},
    ),
    "added": (
        {"vocabulary": 33, "trainable_token_indices": [31, 32]},
        {(WEIGHT, EMBEDDING): (33, HIDDEN), (WEIGHT, HEAD): (33, HIDDEN)},
    ),
}


@pytest.mark.parametrize("form", SHAPES)
def test_only_what_an_adapter_has_takes_memory(form, folders, models, tmp_path):
    sites, base = models[False]
    fields, expected = SHAPES[form]
    save_trained(folders[False], tmp_path, **{"target_modules": Q, **fields})
    plan = check_adapter(tmp_path, sites, base=base)
    weights = read_adapter(tmp_path, sites, torch.float32, base=base)
    assert {key: tuple(tensor.shape) for key, tensor in weights.extras.tensors.items()} == expected
    assert set(expected) <= set(extra_keys(sites, base))
    assert weights.extras_bytes == plan.extras_bytes
    assert not weights.no_effect
    for (kind, _), tensor in weights.extras.tensors.items():
        assert tensor.dtype == (torch.int64 if kind == TOKENS else torch.float32)
        assert torch.isfinite(tensor).all()


def test_without_linears_an_adapter_has_one_rank(folders, models, tmp_path):
    sites, base = models[False]
    save_trained(folders[False], tmp_path, target_modules=["lm_head"], r=9)
    weights = read_adapter(tmp_path, sites, torch.float32, base=base)
    assert (weights.rank, weights.buffers) == (1, ())
    assert all(site is None for site in weights.sites)


def test_norms_as_they_were_have_no_effect(folders, models, tmp_path, edit_tensors):
    sites, base = models[False]
    save_trained(folders[False], tmp_path, modules_to_save=["model.norm"], target_modules=Q)

    def untrained(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()
        tensors["base_model.model.model.norm.weight"] = base.norms["model.norm"].clone()

    edit_tensors(tmp_path, untrained)
    assert read_adapter(tmp_path, sites, torch.float32, base=base).no_effect
