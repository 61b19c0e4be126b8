# SPDX-License-Identifier: Apache-2.0
"""Norms, embeddings, heads and tokens that do not fit their config or the base model are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from extras_models import save_trained
from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.errors import MultiloraError

VOCABULARY, HIDDEN = 31, 32
Q = ["q_proj"]
TABLES = ["embed_tokens", "lm_head"]


def without(*parts: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return edit


def with_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"base_model.model.{name}": tensor})


def changed(part: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensor.add_(1) for name, tensor in tensors.items() if part in name]


TABLE = torch.ones(VOCABULARY, HIDDEN)
Refusal = tuple[bool, dict[str, Any], dict[str, Any], Callable[[dict[str, Tensor]], Any] | None, str]
REFUSALS: dict[str, Refusal] = {
    "linears": (False, {"modules_to_save": ["mlp"]}, {}, None, r"^modules_to_save: full weights of linears \(mod"),
    "a linear": (False, {"modules_to_save": ["o_proj"]}, {}, None, r"^modules_to_save: full weights of linears \(mod"),
    "no norm": (False, {"modules_to_save": ["norm"]}, {}, without("model.norm"), r"^model\.norm\.weight: is missing"),
    "a norm that is not named": (
        False, {}, {}, with_tensor("model.norm.weight", torch.ones(HIDDEN)),
        r"model\.norm\.weight: modules_to_save in adapter_config.json does not ask for it",
    ),
    "a norm too long": (
        False, {"modules_to_save": ["model.norm"]}, {}, with_tensor("model.norm.weight", torch.ones(HIDDEN + 1)),
        r"model\.norm\.weight: has shape \[33\], expected \[32\]",
    ),
    "NaN in a norm": (
        False, {"modules_to_save": ["model.norm"]}, {}, with_tensor("model.norm.weight", torch.ones(HIDDEN) / 0),
        r"model\.norm\.weight: holds NaN or infinity",
    ),
    "no head": (False, {"modules_to_save": ["lm_head"]}, {}, without("lm_head"), r"^lm_head\.weight: is missing"),
    "a head too narrow": (
        False, {"modules_to_save": ["lm_head"]}, {}, with_tensor("lm_head.weight", TABLE[:, 1:].contiguous()),
        r"lm_head\.weight: has shape \[31, 31\], expected \[31, 32\]",
    ),
    "more tokens in one table": (
        False, {"modules_to_save": TABLES}, {}, with_tensor("lm_head.weight", torch.ones(VOCABULARY + 2, HIDDEN)),
        r"(lm_head|embed_tokens)\.weight: has 3\d rows, which .* does not have in the file",
    ),
    "another base": (
        False, {"target_modules": ["lm_head"]}, {}, changed("base_layer"),
        r"lm_head\.base_layer\.weight: differs from the base model's weight; .*save_embedding_layers",
    ),
    "a head beside its LoRA": (
        False, {"target_modules": ["lm_head"]}, {}, with_tensor("lm_head.weight", TABLE),
        r"lm_head\.weight: PEFT would not find it",
    ),
    "no A": (False, {"target_modules": TABLES}, {}, without("embedding_A"), r"embed_tokens\.lora_embedding_A: is miss"),
    "LoRA that is not asked for": (
        False, {"target_modules": [*Q, "lm_head"]}, {"target_modules": Q}, without("base_layer"),
        r"lm_head\.lora_A\.weight: target_modules in adapter_config.json does not ask for it",
    ),
    "bias on embeddings": (
        False, {"target_modules": ["embed_tokens"]}, {"lora_bias": True}, None, "^lora_bias: PEFT does not combine",
    ),
    "tokens twice": (
        False, {"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3, 3]}, None,
        "^trainable_token_indices: must be lists of different token ids",
    ),
    "unknown tokens": (
        False, {"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3, 31]}, None,
        "^trainable_token_indices: must be below the vocabulary's 31, got 31",
    ),
    "tokens of a linear": (
        False, {"trainable_token_indices": [3, 4]}, {"trainable_token_indices": {"up_proj": [3, 4]}}, None,
        "^trainable_token_indices: 'up_proj' is neither the embedding nor the head",
    ),
    "other tokens": (
        False, {"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3]}, None,
        r"trainable_tokens_delta: has shape \[2, 32\], expected \[1, 32\]",
    ),
    "tokens of a saved table": (
        False, {"trainable_token_indices": [3, 4]}, {"modules_to_save": ["embed_tokens"]}, None,
        r"^trainable_token_indices: model\.embed_tokens is in modules_to_save as well",
    ),
    "tokens of a table with LoRA": (
        False, {"trainable_token_indices": [3, 4]}, {"target_modules": [*Q, "embed_tokens"]}, None,
        r"^trainable_token_indices: model\.embed_tokens is in target_modules as well",
    ),
    "tied tables that differ": (
        True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}, changed("lm_head"),
        r"lm_head\.weight: differs from .*embed_tokens\.weight, which is the same in PEFT",
    ),
    "tied LoRA that differs": (
        True, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, {}, changed("lm_head.lora_B"),
        r"lm_head\.lora_B\.weight: differs from .*lora_embedding_A, which is the same in PEFT",
    ),
    "tied tokens that differ": (
        True, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}, {"ensure_weight_tying": True}, None,
        "^trainable_token_indices: with ensure_weight_tying embedding and head must have the same tokens",
    ),
    "a shared table that nobody names": (
        True, {}, {}, with_tensor("model.embed_tokens.weight", TABLE),
        r"embed_tokens\.weight: modules_to_save does not name it, and it is not clear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_by_name(case, folders, models, tmp_path, change, edit_tensors):
    tied, fields, changes, edit, match = REFUSALS[case]
    sites, base = models[tied]
    save_trained(folders[tied], tmp_path, **{"target_modules": Q, **fields})
    if edit is not None:
        edit_tensors(tmp_path, edit)
    if changes:
        change(tmp_path, **changes)
    with pytest.raises(MultiloraError, match=match):
        read_adapter(tmp_path, sites, torch.float32, base=base)


def test_without_the_base_model_they_are_refused(folders, models, tmp_path):
    sites, _ = models[False]
    for field, value in (("modules_to_save", ["norm"]), ("trainable_token_indices", [3])):
        save_trained(folders[False], tmp_path / field, target_modules=Q, **{field: value})
        with pytest.raises(MultiloraError, match=f"^{field}: needs the base model, which is not loaded"):
            check_adapter(tmp_path / field, sites)
