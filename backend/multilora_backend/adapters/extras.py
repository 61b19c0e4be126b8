# SPDX-License-Identifier: Apache-2.0
"""What an adapter has besides A and B of linears: a few tensors, each with a key, side by side in one block.

The model has a fixed list of keys, one for every place where an extra may act. An adapter has tensors for some of them,
and only those take memory. A new kind of extra is a new kind of key with a spec, whoever fills it when an adapter is
read, and whoever uses it in a step; nothing in between changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora_backend.adapters import layout
from multilora_backend.adapters.base import EMBEDDING, HEAD, BaseModel
from multilora_backend.adapters.layout import Buffer
from multilora_backend.core import LoraSite

ALIGNMENT = 16
"""Bytes: every tensor begins at a multiple of it, and offsets are counted in it."""

AFFINE = "affine"
"""The output of a linear (or of the embedding) becomes gain * y + shift. Float32 [2, width]: gain, then shift."""
WEIGHT = "weight"
"""Takes the place of a norm's, the embedding's or the head's weight. In the model's dtype, as all that follow."""
LORA_A, LORA_B = "lora_a", "lora_b"
"""LoRA on the embedding ([vocabulary, rank] and [rank, hidden]) or head ([rank, hidden] and [vocabulary, rank]), the
scale in B."""
TOKENS, ROWS = "tokens", "rows"
"""Int64 [n] and [n, hidden]: tokens whose rows of the embedding's or head's weight are replaced, and by what."""

ExtraKey = tuple[str, str]
"""(kind, the place's name in the model, for AFFINE on linears a site's key)."""


@dataclass(frozen=True)
class ExtraSpec:
    key: ExtraKey
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """With the gap to the next one."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class Extras:
    """On the host, in pinned memory if that was asked for."""

    buffer: Buffer
    """Bytes, as they go to the device."""
    tensors: dict[ExtraKey, Tensor]
    """Views of the buffer."""
    offsets: dict[ExtraKey, int]
    """Where each begins, in units of ALIGNMENT."""

    @property
    def size(self) -> int:
        """Bytes on the device."""
        return len(self.buffer.data)

    @property
    def vocabulary(self) -> int:
        """Tokens that the adapter knows; 0: those of the base model."""
        table = self.tensors.get((WEIGHT, EMBEDDING))
        return 0 if table is None else len(table)


def affine_spec(site: LoraSite) -> ExtraSpec:
    return ExtraSpec((AFFINE, site.key), (2, site.width), torch.float32)


def extra_keys(sites: Iterable[LoraSite], base: BaseModel | None) -> list[ExtraKey]:
    """All that adapters of a model may have. They begin with AFFINE of each site, in the order of the sites."""
    keys = [affine_spec(site).key for site in sites]
    if base is None:
        return keys
    keys += [(WEIGHT, name) for name in base.norms]
    kinds = (AFFINE, WEIGHT, LORA_A, LORA_B, TOKENS, ROWS)
    return keys + [(kind, place) for place in (EMBEDDING, HEAD) for kind in kinds]


def size_of(specs: Iterable[ExtraSpec]) -> int:
    """Bytes that they take on the device."""
    return sum(spec.nbytes for spec in specs)


def extras_host_bytes(specs: Sequence[ExtraSpec], pin: bool) -> int:
    """What `allocate_extras` would allocate, if there are any."""
    return layout.allocated(size_of(specs), pin) if specs else 0


def allocate_extras(specs: Sequence[ExtraSpec], pin: bool = False) -> Extras:
    """Memory, not initialised. Raises ValueError if a key occurs twice."""
    buffer = layout.allocate_buffer([size_of(specs) // torch.float32.itemsize], torch.float32, pin)
    data = buffer.data.view(torch.uint8)
    tensors, offsets, at = {}, {}, 0
    for spec in specs:
        if spec.key in tensors:
            raise ValueError(f"specs: {spec.key} occurs twice")
        used = math.prod(spec.shape) * spec.dtype.itemsize
        tensors[spec.key] = data[at : at + used].view(spec.dtype).view(spec.shape)
        offsets[spec.key] = at // ALIGNMENT
        at += spec.nbytes
    return Extras(Buffer(data, (at,), buffer.nbytes), tensors, offsets)
