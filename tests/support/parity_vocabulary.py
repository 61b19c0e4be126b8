# SPDX-License-Identifier: Apache-2.0
"""Cases of the parity suite: norms, the embedding, the output head, and tokens."""

from __future__ import annotations

from typing import Any

from parity_case import Case
from parity_families import Family

TABLES = ["embed_tokens", "lm_head"]
TRAINED = (5, 3, 47, 7)
"""Tokens that prompts must have, or their training would not show."""


def saves(*names: str, **more: Any) -> Any:
    return lambda f: {"modules_to_save": list(names), "target_modules": [f.q], **more}


def lora(*names: str, **more: Any) -> Any:
    return lambda f: {"target_modules": [f.q, *names], **more}


def tokens(trained: Any, **more: Any) -> Any:
    return lambda f: {"trainable_token_indices": trained, "target_modules": [f.o], **more}


def _some_norms(f: Family) -> dict[str, Any]:
    return {"modules_to_save": ["0.post_attention_layernorm", "q_norm"], "target_modules": [f.o]}


CASES = [
    Case("target_modules", "embed_tokens", lora("embed_tokens", r=5, use_rslora=True)),
    Case("target_modules", "lm_head", lora("lm_head", rank_pattern={"lm_head": 3})),
    Case("target_modules", "lm_head alone", lambda f: {"target_modules": ["lm_head"], "r": 5}, "no linear at all"),
    Case("target_modules", "embed_tokens and lm_head", lora(*TABLES, alpha_pattern={"embed_tokens": 3})),
    Case("use_dora", "on embed_tokens and lm_head", lora(*TABLES, use_dora=True)),
    Case("lora_bias", "on lm_head", lora("lm_head", lora_bias=True)),
    Case("modules_to_save", "all norms", saves("norm", r=4)),
    Case("modules_to_save", "some norms", _some_norms, "q_norm where the model has one"),
    Case("modules_to_save", "norms, with DoRA", lambda f: {"modules_to_save": ["input_layernorm"], "use_dora": True}),
    Case("modules_to_save", "lm_head", saves("lm_head")),
    Case("modules_to_save", "embed_tokens", saves("embed_tokens")),
    Case("modules_to_save", "embed_tokens, lm_head and the last norm", saves(*TABLES, "model.norm")),
    Case("trainable_token_indices", "a list", tokens([*TRAINED]), "of the embedding, and of a head that is tied to it",
         inserts=(TRAINED,)),
    Case("trainable_token_indices", "by table",
         tokens({"embed_tokens": [3, 5, 9], "lm_head": [8, 2]}), inserts=(TRAINED,)),
    Case("trainable_token_indices", "of the head", tokens({"lm_head": [*range(3, 30)]})),
    Case("ensure_weight_tying", "modules_to_save, embedding", saves("embed_tokens", ensure_weight_tying=True),
         "acts on models with tied tables; elsewhere as if it was off"),
    Case("ensure_weight_tying", "modules_to_save, head", saves("lm_head", ensure_weight_tying=True)),
    Case("ensure_weight_tying", "LoRA on the embedding", lora("embed_tokens", ensure_weight_tying=True)),
    Case("ensure_weight_tying", "LoRA on the head", lora("lm_head", ensure_weight_tying=True)),
    Case("ensure_weight_tying", "trainable_token_indices",
         tokens({"embed_tokens": [4, 11, *TRAINED], "lm_head": [4, 11, *TRAINED]}, ensure_weight_tying=True),
         inserts=(TRAINED,)),
    Case("added tokens", "modules_to_save of both tables", saves(*TABLES), "a resized vocabulary",
         vocabulary=67, inserts=((66, 61),)),
    Case("added tokens", "LoRA on both tables", lora(*TABLES), vocabulary=70, inserts=((69, 61),)),
    Case("added tokens", "trainable_token_indices", tokens([61, 62, 63]), vocabulary=64, inserts=((63, 62),)),
    Case("added tokens", "LoRA on linears only", lora(), "the resized tables come with the adapter",
         vocabulary=63, inserts=((62,),)),
    Case("added tokens", "fewer than the base model", lora(), vocabulary=60),
]  # fmt: skip
