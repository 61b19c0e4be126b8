# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters that are more than A and B, each trained in everything that its config lets be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"]


def save_trained(model: Path, folder: Path, seed: int = 0, **fields: Any) -> Path:
    """An adapter of `model` with these LoraConfig fields and random values in all that PEFT says is trainable."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", **fields}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        values = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:  # around the norms that PEFT has computed
            parameter.data *= 1 + 0.3 * values
        elif name.endswith(".bias"):
            parameter.data += 0.5 * values
        else:
            parameter.data.copy_(0.1 * values)
    adapted.save_pretrained(str(folder))
    return folder
