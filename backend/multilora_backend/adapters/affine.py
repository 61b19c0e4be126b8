# SPDX-License-Identifier: Apache-2.0
"""What trained biases and DoRA make of a linear's output: y becomes gain * y + shift, by adapter and column.

Let y = W x + b + scale B A x be what a linear gives with its LoRA. PEFT's result (tuners/lora/{layer,dora}.py) is

    gain * (y - b) + b' + scale b_B,    gain = m / |W + scale B A| by row (DoRA; else 1)

where b' is the trained bias (else b) and b_B is lora_B's own: so shift = b' - gain b + scale b_B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.dora import row_norms
from multilora_backend.adapters.extras import Extras, affine_spec
from multilora_backend.adapters.tensors import TensorInfo
from multilora_backend.core import LoraSite
from multilora_backend.errors import invalid


@dataclass(frozen=True)
class AffinePart:
    """For one module: slice `slice` of site `site`. Every tensor is [out_features] or, where there is none, None."""

    module: str
    site: int
    slice: int
    magnitude: TensorInfo | None = None
    """DoRA's m, and then A and B, whose norm it is divided by."""
    a: TensorInfo | None = None
    b: TensorInfo | None = None
    lora_bias: TensorInfo | None = None
    bias: TensorInfo | None = None
    """Takes the base's place."""
    scale: float = 1.0
    """Of the module's LoRA."""


def fill_affine(
    extras: Extras,
    parts: Iterable[AffinePart],
    sites: Sequence[LoraSite],
    base: BaseModel,
    tensor: Callable[[TensorInfo], Tensor],
) -> bool:
    """Writes the parts' gains and shifts into the extras. Returns whether any of them changes anything.

    `tensor` gives the content of a tensor in the file; those of A and B are known to be finite. Raises MultiloraError
    if another is not finite or a norm is zero.
    """
    effect = False
    parts = list(parts)
    for site in {sites[part.site].key: sites[part.site] for part in parts}.values():
        gain, shift = extras.tensors[affine_spec(site).key]
        gain.fill_(1)
        shift.zero_()
    for part in parts:
        site = sites[part.site]
        first = sum(site.out_features[: part.slice])
        columns = slice(first, first + site.out_features[part.slice])
        gain, shift = (row[columns] for row in extras.tensors[affine_spec(site).key])
        linear = base.linears[part.site]
        if part.magnitude is not None and part.a is not None and part.b is not None:
            norms = row_norms(linear.base_weight[columns], tensor(part.a), tensor(part.b), part.scale)
            gain.copy_(finite(part.magnitude, tensor(part.magnitude)) / norms)
            if not torch.isfinite(gain).all():
                raise invalid(part.magnitude.name, "is divided by the norm of a row of W + scale B A that is zero")
        bias = linear.base_bias
        if bias is not None:
            before = bias[columns].float().cpu()
            after = before if part.bias is None else finite(part.bias, tensor(part.bias))
            shift.copy_(after - gain * before)
        if part.lora_bias is not None:
            shift.add_(finite(part.lora_bias, tensor(part.lora_bias)), alpha=part.scale)
        effect = effect or bool((gain != 1).any() or shift.any())
    return effect


def finite(info: TensorInfo, content: Tensor) -> Tensor:
    """The content in float32. Raises MultiloraError that names the tensor if it holds NaN or infinity there."""
    content = content.float()
    if not torch.isfinite(content).all():
        raise invalid(info.name, "holds NaN or infinity")
    return content
