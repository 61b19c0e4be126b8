# SPDX-License-Identifier: Apache-2.0
"""Tiny bf16 models of real head widths, and transformers with peft to judge what an engine computes with them.

Everything takes a device, so that a test for CUDA runs on the CPU as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import tiny_models
from multilora_backend.core import FinishReason, SamplingParams

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none")
CUDA = [pytest.mark.gpu, NEEDS_CUDA]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
"""Parameters of a fixture or test that runs on each."""
TIMEOUT_S = 600
"""Of a test on CUDA: the first one of a head width waits about a minute for FlashInfer's compiler."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "query_pre_attn_scalar": 50,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 4.0,
        "layer_types": ["full_attention", "full_attention"],
    },
    "gemma3_text": {"query_pre_attn_scalar": 50, "layer_types": ["full_attention", "full_attention"]},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.15,
        "logits_scaling": 1.7,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64},
}
"""Without windows and capped scores: of these FlashInfer compiles variants of their own, a minute each."""
MIXED_RANKS: dict[str, dict[str, Any]] = {
    "r3": {"r": 3},
    "attention": {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "r16": {"r": 16},
    "r40": {"r": 40},
    "r100": {"r": 100},
}
WITH_EXPERTS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "router": {"target_modules": ["k_proj"], "target_parameters": ["gate.weight"]},
    "experts": {"target_modules": [], "target_parameters": ["gate_up_proj", "experts.down_proj"], "r": 3},
    "everything": {"r": 20},
}
"""LoraConfig fields by name of adapters, for any family and for one with experts."""


def save_model(folder: Path, family: str = "llama", **more: Any) -> Path:
    """A two-layer model in bf16 with two query heads to a KV head, and a tokenizer of `tiny_models`' words."""
    settings = {
        "vocab_size": tiny_models.VOCAB,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.15,
        **FAMILIES[family],
        **more,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    for parameter in model.parameters():  # norms at 1 and biases at 0 would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    words = models.WordLevel({f"w{i}": i for i in range(tiny_models.VOCAB)}, unk_token="w0")
    Tokenizer(words).save(str(folder / "tokenizer.json"))
    return folder


def save_adapters(model: Path, folder: Path, adapters: dict[str, dict[str, Any]], scale: float = 0.1) -> None:
    """PEFT adapters of random A and B (values that bf16 can hold) by name and LoraConfig fields."""
    for seed, (name, lora) in enumerate(adapters.items()):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        torch.manual_seed(seed)
        settings = {"r": 8, "lora_alpha": 2 * lora.get("r", 8), "target_modules": "all-linear", **lora}
        adapted = peft.get_peft_model(base, peft.LoraConfig(**settings))
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.data.normal_(0, scale).copy_(parameter.data.bfloat16())
        adapted.save_pretrained(folder / name)


def random_sampling(rng: random.Random, most_tokens: int) -> dict[str, Any]:
    """Fields of SamplingParams: few requests want much, many nothing but a length and a temperature."""
    sampling: dict[str, Any] = {"max_tokens": rng.randint(1, most_tokens), "temperature": rng.choice((0.0, 0.7, 1.3))}
    options = {
        "seed": rng.randrange(2**40),
        "top_p": 0.9,
        "top_k": 11,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": -0.3,
        "logprobs": rng.randint(0, 5),
        "logit_bias": {rng.randrange(60): 2.0},
        "min_tokens": min(3, sampling["max_tokens"]),
        "stop_token_ids": (5, 6),
        "ignore_eos": False,
        "n": rng.randint(2, 3),
    }
    return sampling | {name: options[name] for name in rng.sample(list(options), rng.choice((0, 0, 1, 3)))}


class Judge:
    """transformers and peft on the same weights, in fp32 for the truth and in bf16 for how far from it bf16 is."""

    def __init__(self, model: Path, adapters: Path, device: str) -> None:
        self._model, self._adapters, self._device = model, adapters, device
        self._modules: dict[tuple[str, torch.dtype], Any] = {}

    @torch.inference_mode()
    def logits(self, adapter: str, token_ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """[tokens, vocab] fp32 on the CPU."""
        ids = torch.tensor([token_ids], device=self._device)
        return self._module(adapter, dtype)(input_ids=ids, use_cache=False).logits[0].float().cpu()

    def _module(self, adapter: str, dtype: torch.dtype) -> Any:
        if (adapter, dtype) not in self._modules:
            module: Any = AutoModelForCausalLM.from_pretrained(self._model, dtype=dtype, attn_implementation="eager")
            if adapter:
                # peft's default is to keep adapters in fp32 beside a bf16 model, for training.
                folder = str(self._adapters / adapter)
                module = peft.PeftModel.from_pretrained(module, folder, autocast_adapter_dtype=False)
            self._modules[adapter, dtype] = module.eval().to(self._device)
        return self._modules[adapter, dtype]


@dataclass
class Request:
    """A request and what became of it; tokens and logits are those of its first sequence."""

    prompt: list[int]
    adapter: str
    sampling: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    """By index of the sequence."""
    rows: dict[int, Tensor] = field(default_factory=dict)
    """[vocab] fp32 by number of the output token: what it was drawn from."""

    @property
    def logits(self) -> Tensor:
        """[output tokens, vocab] fp32 on the CPU."""
        return torch.stack([self.rows[i] for i in range(len(self.token_ids))]).cpu()


def check_logits(requests: Iterable[Request], judge: Judge, tie: float = 0.0) -> None:
    """What the requests were drawn from is as near to the fp32 truth as transformers' own bf16 is.

    That is 1% to 5% off for these models, whatever the order of the sums; without its adapter a request is 100% off.
    Measured on the CPU, ours are at 0.8 to 1.0 times transformers' distance, single requests at 0.6 to 1.2 times.

    `tie`: how far off a request may be whatever transformers' distance is. Where two experts are as good as each other
    for a row, bf16 decides which of them it visits, here and there.
    """
    ours_total = theirs_total = 0.0
    for request in requests:
        tokens, first = request.prompt + request.token_ids, len(request.prompt) - 1
        truth = judge.logits(request.adapter, tokens)[first:-1]
        theirs = judge.logits(request.adapter, tokens, torch.bfloat16)[first:-1]
        ours_off = float((request.logits - truth).norm() / truth.norm())
        theirs_off = float((theirs - truth).norm() / truth.norm())
        what = f"adapter {request.adapter!r}, {len(request.prompt)} + {len(request.token_ids)} tokens"
        assert ours_off <= max(2 * theirs_off, tie), f"{what}: {ours_off:.4f} off, transformers {theirs_off:.4f}"
        ours_total += ours_off**2
        theirs_total += max(theirs_off, tie) ** 2
    assert 0 < ours_total**0.5 <= 1.5 * theirs_total**0.5
