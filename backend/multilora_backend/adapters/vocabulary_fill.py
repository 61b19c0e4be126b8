# SPDX-License-Identifier: Apache-2.0
"""Writes what an adapter does to the embedding or the head into its extras, as the steps read it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from multilora_backend.adapters.affine import finite
from multilora_backend.adapters.base import EMBEDDING, BaseModel
from multilora_backend.adapters.contents import put
from multilora_backend.adapters.dora import CHUNK_BYTES, own_stream, row_norms
from multilora_backend.adapters.extras import AFFINE, LORA_A, LORA_B, ROWS, TOKENS, WEIGHT, Extras
from multilora_backend.adapters.tensors import TensorInfo
from multilora_backend.adapters.vocabulary import TablePart
from multilora_backend.errors import invalid

Content = Callable[[TensorInfo], Tensor]


def fill_table(extras: Extras, part: TablePart, base: BaseModel, tensor: Content) -> bool:
    """Returns whether anything changes. `tensor` gives the content of a tensor in the file.

    Raises MultiloraError if a tensor is not finite, or differs from what it is said to be a copy of.
    """
    own = base.embedding if part.place == EMBEDDING else base.head
    assert own is not None
    for first, second in part.twins:
        one, other = tensor(first), tensor(second)
        if not one.equal(other if one.shape == other.shape else other.T):
            raise invalid(first.name, f"differs from {second.name}, which is the same in PEFT")
    if part.same is not None and not _same(own, tensor(part.same)):
        raise invalid(
            part.same.name,
            "differs from the base model's weight; save the adapter with save_embedding_layers=False, or the module by "
            "modules_to_save",
        )

    def target(kind: str) -> Tensor:
        return extras.tensors[kind, part.place]

    effect = False
    if part.weight is not None:
        own = target(WEIGHT)
        effect = put(own, part.weight, tensor(part.weight)) or effect
    if part.rows is not None:
        effect = True
        rows = own.new_empty(len(part.tokens), part.hidden, device="cpu") if part.weight else target(ROWS)
        put(rows, part.rows, tensor(part.rows))
        ids = torch.tensor(part.tokens)
        if part.weight is not None:
            own[ids] = rows
        else:
            target(TOKENS).copy_(ids)
    if part.a is not None and part.b is not None:
        turned = part.place == EMBEDDING
        a, b = target(LORA_A), target(LORA_B)
        pair = [put(a.T if turned else a, part.a, tensor(part.a))]
        pair.append(put(b.T if turned else b, part.b, tensor(part.b), part.scale))
        effect = all(pair) or effect
    return _fill_affine(extras, part, own, tensor) or effect


def _fill_affine(extras: Extras, part: TablePart, own: Tensor, tensor: Content) -> bool:
    """DoRA's gain and lora_B's bias. `own`: the weight, [vocabulary, hidden], that LoRA is added to."""
    if part.magnitude is None and part.lora_bias is None:
        return False
    gain, shift = extras.tensors[AFFINE, part.place]
    gain.fill_(1)
    shift.zero_()
    if part.magnitude is not None and part.a is not None and part.b is not None:
        weight = own.T if part.place == EMBEDDING else own
        norms = row_norms(weight, tensor(part.a), tensor(part.b), part.scale)
        gain.copy_(finite(part.magnitude, tensor(part.magnitude)) / norms)
        if not torch.isfinite(gain).all():
            raise invalid(part.magnitude.name, "is divided by the norm of a row of W + scale B A that is zero")
    if part.lora_bias is not None:
        shift.add_(finite(part.lora_bias, tensor(part.lora_bias)), alpha=part.scale)
    return bool((gain != 1).any() or shift.any())


def _same(weight: Tensor, copy: Tensor) -> bool:
    """Whether `copy`, on the host, is `weight` in the weight's dtype."""
    rows = max(1, CHUNK_BYTES // (weight.shape[1] * copy.element_size()))
    with own_stream(weight.device):
        pieces = zip(weight.split(rows), copy.split(rows), strict=True)
        return all(mine.equal(theirs.to(mine.device, mine.dtype)) for mine, theirs in pieces)
