# SPDX-License-Identifier: Apache-2.0
"""Puts our decoder layers in place of a transformers model's own, and tells where LoRA may act."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from multilora_backend.adapters.base import BaseIdentity, BaseModel
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.models.layers import Attention, DecoderLayer, GatedMlp, Norm
from multilora_backend.models.linear import FusedLinear
from multilora_backend.models.moe import ExpertLinears, MoeMlp, Router
from multilora_backend.models.vocabulary import Embedding, Head

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of gated activations, and ours."""


FORMER = {
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "qwen3_moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
}
"""Parameters of experts, and the linears that each expert had in transformers 4 instead."""


def fuse(model: Any, experts: bool = True) -> list[LoraSite]:
    """Replaces every decoder layer in place; returns the sites in the order of the layers, with or without experts.

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
        decoder.layers[index] = _fused_layer(layer, f"model.layers.{index}", next_norm, index == 0, sites, experts)
    decoder.norm = nn.Identity()  # done by the last layer
    decoder.embed_tokens, model.lm_head = Embedding(decoder.embed_tokens), Head(model.lm_head)
    return sites


def linears(model: nn.Module) -> list[FusedLinear]:
    """In the order of their sites."""
    return sorted((m for m in model.modules() if isinstance(m, FusedLinear)), key=lambda m: m.index)


def base_model(model: Any, folder: Path | None = None) -> BaseModel:
    """What adapters are told of a fused model, whose tokenizer and weights lie in `folder`."""
    norms = {module.name: module.weight.data for module in model.modules() if isinstance(module, Norm)}
    path = None if folder is None else folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path)) if path is not None and path.is_file() else None
    own = {linear.index: linear for linear in linears(model)}
    identity = None if folder is None else BaseIdentity(type(model).__name__, model.config.to_dict(), folder)
    return BaseModel(own, norms, model.model.embed_tokens.weight, model.lm_head.weight, tokenizer, identity)


def _fused_layer(
    layer: Any, path: str, next_norm: Any, first: bool, sites: list[LoraSite], experts: bool
) -> DecoderLayer:
    attention = layer.self_attn
    kind = ACTIVATIONS.get(_activation(layer))
    if kind is None:
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"model: activation {_activation(layer)!r} is not supported")
    qkv = _linear(attention, f"{path}.self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj", sites)
    o = _linear(attention, f"{path}.self_attn", ("o_proj",), "o_proj", sites)
    mlp: GatedMlp | MoeMlp
    if hasattr(layer.mlp, "experts"):
        mlp = _moe(layer.mlp, f"{path}.mlp", kind, sites, experts, attention.config.model_type)
    else:
        mlp = _mlp(layer.mlp, f"{path}.mlp", kind, sites)
    return DecoderLayer(layer, Attention(attention, qkv, o), mlp, next_norm, first)


def _mlp(mlp: Any, path: str, kind: str, sites: list[LoraSite]) -> GatedMlp:
    gate_up = _linear(mlp, path, ("gate_proj", "up_proj"), "gate_up_proj", sites)
    return GatedMlp(kind, gate_up, _linear(mlp, path, ("down_proj",), "down_proj", sites))


def _moe(mlp: Any, path: str, kind: str, sites: list[LoraSite], experts: bool, model_type: str) -> MoeMlp:
    num_experts, hidden = mlp.gate.weight.shape
    gate = nn.Linear(hidden, num_experts, bias=False, device="meta")
    gate.weight = mlp.gate.weight
    module = f"{path}.gate"
    site = LoraSite(module, hidden, (module,), (num_experts,), f"{module}.weight")
    router = Router(mlp.gate, FusedLinear(site, len(sites), [gate]))
    sites.append(site)
    linears = []
    for name, own in FORMER[model_type].items():
        weight = getattr(mlp.experts, name)
        linears.append(ExpertLinears(weight, len(sites)))
        if experts:
            key, (_, width, in_features) = f"{path}.experts.{name}", weight.shape
            were = tuple(f"{path}.experts.{{}}.{part}" for part in own)
            sites.append(LoraSite(key, in_features, (f"{path}.experts",), (width,), key, num_experts, were))
    return MoeMlp(kind, router, *linears)


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
