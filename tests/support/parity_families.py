# SPDX-License-Identifier: Apache-2.0
"""The base models of the parity suite: one tiny random model of every supported family, with all of its quirks on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 61
LAYERS = 2
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
APART = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
ATTENTION = ("self_attn.q_proj", "self_attn.o_proj", "self_attn.k_proj", "self_attn.v_proj")
GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 6, "attention_bias": True, "sliding_window": 19}
SPARSE: dict[str, Any] = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    model_type: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    """Embedding and head are one weight."""
    paths: tuple[str, str, str, str] = APART
    """Four linears of a layer, on which cases put LoRA: two of attention and two of the MLP, where that has linears."""
    experts: bool = False

    @property
    def q(self) -> str:
        return self._name(0)

    @property
    def o(self) -> str:
        return self._name(1)

    @property
    def up(self) -> str:
        """In a mixture of experts, whose MLP has no linears, k."""
        return self._name(2)

    @property
    def down(self) -> str:
        """Likewise v."""
        return self._name(3)

    def path(self, name: str, layer: int) -> str:
        """The full name of one of the four in the model."""
        return next(f"model.layers.{layer}.{path}" for path in self.paths if path.endswith(f".{name}"))

    def _name(self, index: int) -> str:
        return self.paths[index].rpartition(".")[2]


_ALL = [
    Family("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Family("mistral", "Mistral", {"sliding_window": 19}),
    Family(
        "qwen2",
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 19, "layer_types": ["full_attention", "sliding_attention"]},
        tied=True,
    ),
    Family("qwen3", "Qwen3", {"head_dim": 16, "attention_bias": True}),
    Family(
        "gemma2",
        "Gemma 2",
        {
            **GEMMA,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        tied=True,
    ),
    Family("gemma3_text", "Gemma 3", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}, tied=True),
    Family("phi3", "Phi-3", {"sliding_window": 19}, paths=FUSED),
    Family(
        "granite",
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.6,
            "logits_scaling": 1.7,
            "mlp_bias": True,
        },
        tied=True,
    ),
    Family(
        "mixtral", "Mixtral", {**SPARSE, "num_local_experts": 4, "sliding_window": 19}, paths=ATTENTION, experts=True
    ),
    Family(
        "qwen3_moe",
        "Qwen3-MoE",
        {**SPARSE, "num_experts": 5, "moe_intermediate_size": 20, "norm_topk_prob": True, "attention_bias": True},
        paths=ATTENTION,
        experts=True,
    ),
]
FAMILIES = {family.model_type: family for family in _ALL}


def save_base(family: Family, folder: Path) -> Any:
    """Saves the family's model and a tokenizer of words; returns the model, for PEFT to build on."""
    config = AutoConfig.for_model(
        family.model_type, **{**COMMON, **family.settings, "tie_word_embeddings": family.tied}
    )
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in made.parameters():  # norms at 1 and biases at 0 would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(folder)
    words = models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    Tokenizer(words).save(str(folder / "tokenizer.json"))
    # As it was saved, with its path, which PEFT writes into adapters.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
