# SPDX-License-Identifier: Apache-2.0
"""Norms that were trained as they are (`modules_to_save`): each adapter brings weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.contents import put
from multilora_backend.adapters.extras import WEIGHT, Extras, ExtraSpec
from multilora_backend.adapters.found import Found
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.tensors import TensorInfo


@dataclass(frozen=True)
class NormPart:
    module: str
    weight: TensorInfo
    spec: ExtraSpec


def plan_norms(config: PeftConfig, found: Found, base: BaseModel) -> tuple[NormPart, ...]:
    """Raises MultiloraError unless exactly those that the config names are in the file."""
    parts = []
    for module, weight in base.norms.items():
        shape = tuple(weight.shape)
        info = found.either(module, "weight", shape, "modules_to_save", config.saves(module))
        if info is not None:
            parts.append(NormPart(module, info, ExtraSpec((WEIGHT, module), shape, weight.dtype)))
    return tuple(parts)


def fill_norms(
    extras: Extras, parts: Iterable[NormPart], base: BaseModel, tensor: Callable[[TensorInfo], Tensor]
) -> bool:
    """Whether any of them differs from the base model's. `tensor` gives the content of a tensor in the file."""
    effect = False
    for part in parts:
        target = extras.tensors[part.spec.key]
        put(target, part.weight, tensor(part.weight))
        effect = effect or not target.equal(base.norms[part.module].to("cpu"))
    return effect
