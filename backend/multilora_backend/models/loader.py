# SPDX-License-Identifier: Apache-2.0
"""From a model folder to a running model: refuse what cannot run right, load, fuse, and prove that fusing was right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from multilora_backend.config import Config
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.models import attention, context
from multilora_backend.models.batch import Batch
from multilora_backend.models.fusion import fuse
from multilora_backend.models.layers import Attention
from multilora_backend.models.lora import NoLora
from multilora_backend.protocol import ModelCard

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "mixtral", "qwen3_moe")
"""`model_type`s that the tests run against transformers."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rope types whose frequencies do not depend on the batch: with others one long request would change its neighbours."""


@dataclass
class LoadedModel:
    module: nn.Module
    config: PretrainedConfig
    sites: list[LoraSite]
    max_model_len: int
    eos_token_ids: list[int]
    dtype: torch.dtype
    device: torch.device


def load_model(config: Config) -> LoadedModel:
    """Loads `config.model` for ragged paged batches. Raises MultiloraError with the reason if it cannot be served."""
    folder = Path(config.model)
    hf = _read_config(folder)
    device = _device(config)
    dtype = _dtype(config, hf, device)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=hf,
        dtype=dtype,
        attn_implementation=attention.NAME,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    module, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(problem):
            raise invalid("model", f"{folder}: {problem.replace('_', ' ')} in the weights: {sorted(info[problem])[:3]}")
    module.eval().requires_grad_(False)
    module.to(device)
    sites = fuse_checked(module, hf.vocab_size, config.block_size, device, config.lora_experts)
    return LoadedModel(module, hf, sites, _max_model_len(config, hf), _eos(folder, hf), dtype, device)


def outline(config: Config, device: torch.device) -> LoadedModel:
    """The model as `load_model` would have it on that device, in everything but its weights: they have shapes only.

    Raises MultiloraError as `load_model` does, as far as that can be known without weights.
    """
    folder = Path(config.model)
    hf = _read_config(folder)
    dtype = _dtype(config, hf, device)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(hf, dtype=dtype, attn_implementation=attention.NAME)
    sites = fuse(module, config.lora_experts)
    return LoadedModel(module, hf, sites, _max_model_len(config, hf), _eos(folder, hf), dtype, device)


def fuse_checked(
    module: Any, vocab_size: int, page_size: int, device: torch.device, experts: bool = True
) -> list[LoraSite]:
    """Puts our layers in and compares the logits of a small batch with those of transformers' own.

    That catches a model whose arithmetic is not what our layers do: norms elsewhere, another activation or scale.
    """
    rows = min(8, page_size)
    ids = torch.arange(rows, device=device)[None] % vocab_size
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        before = module(input_ids=ids, use_cache=False).logits.float()
    module.set_attn_implementation(attention.NAME)
    sites = fuse(module, experts)
    caches = attach_kv_cache(module, num_pages=2, page_size=page_size, device=device)
    after = _probe(module, ids, page_size, device)
    caches.clear()
    # Fusing changes only how sums are ordered. 32 ulps of the model's dtype (a quarter of the largest logit in bf16)
    # are far above what that does, and far below wrong wiring, whose logits have nothing to do with the right ones.
    tolerance = 32 * torch.finfo(module.dtype).eps * before.abs().max()
    if not torch.allclose(before, after, rtol=0, atol=float(tolerance)):
        raise MultiloraError(
            ErrorCode.UNSUPPORTED, f"model: {type(module).__name__} gives other logits with fused layers; refused"
        )
    return sites


def attach_kv_cache(module: Any, num_pages: int, page_size: int, device: torch.device) -> list[Tensor]:
    """Hangs a zeroed KV tensor `[pages, 2, page_size, kv_heads, head_dim]` on every attention module."""
    caches = []
    for layer in attention_modules(module):
        shape = (num_pages, 2, page_size, layer.num_kv_heads, layer.head_dim)
        layer.kv_cache = torch.zeros(shape, dtype=module.dtype, device=device)
        caches.append(layer.kv_cache)
    return caches


def attention_modules(module: nn.Module) -> list[Attention]:
    return [m for m in module.modules() if isinstance(m, Attention)]


def bytes_per_token(model: LoadedModel) -> int:
    """KV bytes of one token over all layers."""
    layers = attention_modules(model.module)
    return sum(2 * m.num_kv_heads * m.head_dim * model.dtype.itemsize for m in layers)


def model_card(model: LoadedModel, config: Config) -> ModelCard:
    """What front ends need. Raises MultiloraError if the folder has no tokenizer.json."""
    folder = Path(config.model)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise invalid("model", f"{folder} holds no tokenizer.json")
    settings = _read_json(folder / "tokenizer_config.json")
    template: Any = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text()
    elif isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    special: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
    return ModelCard(
        model=config.model,
        max_model_len=model.max_model_len,
        vocab_size=model.config.vocab_size,
        eos_token_ids=model.eos_token_ids,
        tokenizer_json=tokenizer.read_bytes(),
        chat_template=template,
        special_tokens=special,
        lora_enabled=config.lora_enabled,
    )


def _probe(module: nn.Module, ids: Tensor, page_size: int, device: torch.device) -> Tensor:
    """Logits of all rows of one sequence that fits a page."""
    rows = ids.shape[1]
    batch = Batch.idle(rows, page_size)
    backend = attention.TorchAttention(page_size, device)
    backend.plan(batch)
    write_slots = torch.from_numpy(batch.write_slots).to(device)
    positions = torch.from_numpy(batch.positions).to(device)[None]
    with torch.inference_mode(), context.step(context.StepContext(backend, NoLora(), write_slots)):
        return module(input_ids=ids, position_ids=positions, use_cache=False).logits.float()


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise invalid("model", f"{folder} holds no config.json")
    hf = AutoConfig.from_pretrained(folder, local_files_only=True)
    _refuse(hf)
    if getattr(hf, "output_router_logits", False):
        hf.output_router_logits = False  # for a loss in training; our layers do not hand them out
    return hf


def _max_model_len(config: Config, hf: PretrainedConfig) -> int:
    limit = int(hf.max_position_embeddings)
    if config.max_model_len > limit:
        raise invalid("max_model_len", f"must be at most {limit}, the model's max_position_embeddings")
    return config.max_model_len or limit


def _refuse(hf: PretrainedConfig) -> None:
    def refuse(why: str) -> MultiloraError:
        return MultiloraError(ErrorCode.UNSUPPORTED, f"model: {why}")

    if hf.model_type not in SUPPORTED:
        raise refuse(f"model_type {hf.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}")
    for kind in _rope_types(hf):
        if kind not in STATIC_ROPE:
            raise refuse(f"rope type {kind!r} changes with the longest request of a batch; supported are {STATIC_ROPE}")
    if getattr(hf, "use_bidirectional_attention", False):
        raise refuse("bidirectional attention is not supported: a token must not see later ones")
    if getattr(hf, "quantization_config", None):
        raise refuse("quantised weights are not supported")


def _rope_types(hf: PretrainedConfig) -> list[str]:
    """One for each kind of layer: Gemma 3 has other frequencies in its sliding layers."""
    rope = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    return [str(r.get("rope_type", r.get("type", "default"))) for r in by_layer_type or [rope]]


def _device(config: Config) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise invalid("device", "is cuda, but torch sees no CUDA device")
    return torch.device(config.device)


def _dtype(config: Config, hf: PretrainedConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored = getattr(hf, "dtype", None)
    return torch.float32 if device.type == "cpu" else (stored or torch.bfloat16)


def _eos(folder: Path, hf: PretrainedConfig) -> list[int]:
    eos: Any = hf.eos_token_id
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id or eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
