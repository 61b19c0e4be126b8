# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters that are more than A and B, each trained in all that its config lets be trained, and their judge."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gpu_driver import Driver, Mode
from gpu_models import Judge, Request
from multilora_backend.adapters.tensors import parse_header, read_header
from multilora_backend.models import linear, lora

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"]
TOKENS = 32
LENGTHS = (1, 41, 6, 23, 14, 9, 30)
TABLES = ["embed_tokens", "lm_head"]
EXTRAS: dict[str, dict[str, dict[str, Any]]] = {
    "affine": {
        "dora": {"use_dora": True, "r": 6},
        "lora-bias": {"lora_bias": True, "r": 20},
        "dora-bias": {"use_dora": True, "bias": "all", "target_modules": ATTENTION},
        "plain": {"r": 3},
    },
    "tables": {
        "norms": {"modules_to_save": ["norm"], "r": 4},
        "both": {"modules_to_save": TABLES, "target_modules": ATTENTION},
        "lora-both": {"target_modules": [*ATTENTION, *TABLES], "use_dora": True},
        "tokens": {"trainable_token_indices": {"embed_tokens": [3, 7, 12], "lm_head": [5]}},
    },
    "added": {
        "added": {"vocabulary": 67, "modules_to_save": TABLES, "target_modules": ATTENTION},
        "added-tokens": {"vocabulary": 64, "trainable_token_indices": [61, 62, 63], "target_modules": ATTENTION},
        "fewer": {"vocabulary": 60},
        "plain": {"r": 3},
    },
}
"""By what they are extras of, then by name: LoraConfig fields and what `save_trained` takes besides."""


def make_base(biased: bool) -> LlamaForCausalLM:
    """With or without biases in all its linears."""
    torch.manual_seed(2)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=biased, mlp_bias=biased,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    return model


def save_trained(model: Path, folder: Path, seed: int = 0, vocabulary: int = 0, **fields: Any) -> Path:
    """An adapter of `model` with these LoraConfig fields and random values in all that PEFT says is trainable.

    `vocabulary`: the embedding is resized to so many tokens before.
    """
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(seed)
    if vocabulary:
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
    settings = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", **fields}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**settings))
    randomise(adapted, seed)
    adapted.save_pretrained(str(folder))
    return folder


def randomise(adapted: Any, seed: int) -> None:
    """Random values in all that PEFT says is trainable."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        values = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:  # around the norms that PEFT has computed
            parameter.data *= 1 + 0.3 * values
        elif "modules_to_save" in name or "trainable_tokens" in name:
            parameter.data += 0.1 * values
        elif name.endswith(".bias"):
            parameter.data += 0.5 * values
        else:
            parameter.data.copy_(0.1 * values)


class ResizingJudge(Judge):
    """Gives the base model as many tokens as the adapter's embedding has, as its user would."""

    def _module(self, adapter: str, dtype: torch.dtype) -> Any:
        if (adapter, dtype) in self._modules or not adapter:
            return super()._module(adapter, dtype)
        folder = self._adapters / adapter
        with (folder / "adapter_model.safetensors").open("rb") as file:
            tensors = parse_header(read_header(file, adapter), adapter)
        module: Any = AutoModelForCausalLM.from_pretrained(self._model, dtype=dtype, attn_implementation="eager")
        tables = [info.shape[0] for name, info in tensors.items() if "embed_tokens" in name and "weight" in name]
        if tables and tables[0] != module.config.vocab_size:
            module.resize_token_embeddings(tables[0], mean_resizing=False)
        module = peft.PeftModel.from_pretrained(module, str(folder), autocast_adapter_dtype=False)
        self._modules[adapter, dtype] = module.eval().to(self._device)
        return self._modules[adapter, dtype]


def prompts(count: int = len(LENGTHS), vocabulary: int = 61) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def driver_of(root: Path, strategy: str, graphs: bool = False, **settings: Any) -> Driver:
    """Prompts are cut in chunks of 16 tokens at most, and decodes share steps with them."""
    fixed = {"dtype": "float32", "block_size": 4, "max_num_batched_tokens": 16, "kv_cache_bytes": 2**23}
    settings = {**fixed, "adapter_extras_bytes": 2**20, **settings}
    return Driver(root, "cpu", Mode(strategy, graphs), overlap=graphs, **settings)


def check(requests: list[Request], judge: Judge) -> None:
    """fp32: within 1e-4 of the largest logit in every row that was sampled, and the same greedy tokens.

    Columns of tokens that the request's adapter does not know are minus infinity.
    """
    for request in requests:
        tokens = request.prompt + request.token_ids
        truth = judge.logits(request.adapter, tokens)[len(request.prompt) - 1 : -1]
        logits = _stacked(request)
        known = truth.shape[1]
        assert (logits[:, known:] == -torch.inf).all(), request.adapter
        assert (logits[:, :known] - truth).abs().max() <= 1e-4 * truth.abs().max(), request.adapter
        assert request.token_ids == truth.argmax(dim=1).tolist(), request.adapter
        assert len(request.token_ids) == TOKENS
        if request.adapter and max(tokens) < 61:  # or this would show nothing
            base = judge.logits("", tokens)[len(request.prompt) - 1 : -1]
            both = min(known, base.shape[1])
            assert (base[:, :both] - truth[:, :both]).abs().max() > 0.05 * truth.abs().max()


def _stacked(request: Request) -> Tensor:
    """Logits of all output tokens; steps differ in width, by who shares them."""
    rows = [request.rows[i] for i in range(len(request.token_ids))]
    width = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, width - len(row)), value=-torch.inf) for row in rows]).cpu()


class Launches(TorchDispatchMode):
    """Counts what torch computes, and calls of our kernels' launchers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[tuple] = Counter()
        for module, name in ((linear, "grouped_expand"), (linear, "row_affine"), (lora, "grouped_shrink")):
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name: str, op: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.counts[name,] += 1
            return op(*arguments)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, Tensor))
        self.counts[str(func), shapes] += 1
        return func(*args, **(kwargs or {}))
