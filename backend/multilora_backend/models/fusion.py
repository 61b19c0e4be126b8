# SPDX-License-Identifier: Apache-2.0
"""Puts our decoder layers in place of a transformers model's own, and tells where LoRA may act."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from multilora_backend.adapters.base import BaseModel
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.models.layers import Attention, DecoderLayer, GatedMlp, Norm
from multilora_backend.models.linear import FusedLinear
from multilora_backend.models.vocabulary import Embedding, Head

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of gated activations, and ours."""


def fuse(model: Any) -> list[LoraSite]:
    """Replaces every decoder layer in place; returns the sites in the order of the layers.

    The output head and the embedding keep their weights, which may be tied, and get modules of ours around them.
    """
    decoder = model.model
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.full_name = name
    sites: list[LoraSite] = []
    layers = list(decoder.layers)
    norms = [layer.input_layernorm for layer in layers[1:]] + [decoder.norm]
    for index, (layer, next_norm) in enumerate(zip(layers, norms, strict=True)):
        decoder.layers[index] = _fused_layer(layer, f"model.layers.{index}", next_norm, index == 0, sites)
    decoder.norm = nn.Identity()  # done by the last layer
    decoder.embed_tokens, model.lm_head = Embedding(decoder.embed_tokens), Head(model.lm_head)
    return sites


def linears(model: nn.Module) -> list[FusedLinear]:
    """In the order of their sites."""
    return sorted((m for m in model.modules() if isinstance(m, FusedLinear)), key=lambda m: m.index)


def base_model(model: Any, folder: Path | None = None) -> BaseModel:
    """What adapters are told of a fused model, whose tokenizer lies in `folder`."""
    norms = {module.name: module.weight.data for module in model.modules() if isinstance(module, Norm)}
    path = None if folder is None else folder / "tokenizer.json"
    token_id = Tokenizer.from_file(str(path)).token_to_id if path is not None and path.is_file() else None
    return BaseModel(linears(model), norms, model.model.embed_tokens.weight, model.lm_head.weight, token_id)


def _fused_layer(layer: Any, path: str, next_norm: Any, first: bool, sites: list[LoraSite]) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    kind = ACTIVATIONS.get(_activation(layer))
    if kind is None:
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"model: activation {_activation(layer)!r} is not supported")
    qkv = _linear(attention, f"{path}.self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj", sites)
    o = _linear(attention, f"{path}.self_attn", ("o_proj",), "o_proj", sites)
    gate_up = _linear(mlp, f"{path}.mlp", ("gate_proj", "up_proj"), "gate_up_proj", sites)
    down = _linear(mlp, f"{path}.mlp", ("down_proj",), "down_proj", sites)
    return DecoderLayer(layer, Attention(attention, qkv, o), GatedMlp(kind, gate_up, down), next_norm, first)


def _activation(layer: Any) -> str:
    config = layer.self_attn.config
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _linear(parent: Any, path: str, names: Sequence[str], fused: str, sites: list[LoraSite]) -> FusedLinear:
    """One linear of the parts, or of the module that transformers itself has fused (Phi-3)."""
    if hasattr(parent, fused):
        names = (fused,)
    parts: list[nn.Linear] = [getattr(parent, name) for name in names]
    site = LoraSite(
        key=f"{path}.{fused}",
        in_features=parts[0].in_features,
        modules=tuple(f"{path}.{name}" for name in names),
        out_features=tuple(part.out_features for part in parts),
    )
    linear = FusedLinear(site, len(sites), parts)
    sites.append(site)
    for name in names:  # the fused copy is enough: an 8B model is 16 GB
        delattr(parent, name)
    return linear
