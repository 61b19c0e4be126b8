# SPDX-License-Identifier: Apache-2.0
"""Tiny random models and PEFT adapters for tests: made on the spot, large enough in their weights to disagree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

VOCAB = 61
ROOM = {"kv_cache_bytes": 2**20, "adapter_device_bytes": 2**22}
"""What an engine over such a model needs. Left to itself it takes and clears 512 MiB, in half a second on a CPU."""


def save_llama(folder: Path, **more) -> Path:
    """A two-layer Llama with grouped-query attention, and a tokenizer of the words `w0` to `w60`."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **more})).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def save_adapter(model: Path, folder: Path, seed: int, **lora) -> Path:
    """A PEFT adapter of `model` with random A and B, so that it changes what the model says."""
    base = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora}))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.25)
    adapted.save_pretrained(folder)
    return folder


def break_adapter(folder: Path) -> None:
    """Its header is fine, and its weights hold a NaN."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def save_all(root: Path, adapters: Mapping[str, Mapping[str, Any]]) -> Path:
    """A model, and adapters by name and LoraConfig fields."""
    save_llama(root / "model")
    for seed, (name, lora) in enumerate(adapters.items()):
        save_adapter(root / "model", root / "adapters" / name, seed, **lora)
    return root


def greedy(model: Path, adapter: Path | None, prompt: list[int], count: int) -> list[int]:
    """What transformers (and PEFT) say, alone and without a cache."""
    module = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    if adapter is not None:
        module = peft.PeftModel.from_pretrained(module, str(adapter))
    module.eval()
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(module(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
