# SPDX-License-Identifier: Apache-2.0
"""What a step's adapters do besides A and B: which of it is in the step, and what kernels and layers need for it.

Each kind of extra has one method here, which the layer that it acts on asks in every step. It answers None unless an
adapter of the step has something for that very place, and then the layer launches what it always does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multilora_backend.adapters.base import EMBEDDING, HEAD
from multilora_backend.adapters.extras import (
    AFFINE,
    LORA_A,
    LORA_B,
    ROWS,
    TOKENS,
    WEIGHT,
    ExtraKey,
    affine_spec,
)
from multilora_backend.adapters.extras_pool import ExtrasPool
from multilora_kernels import Affine, SegmentPlan, Segments

if TYPE_CHECKING:
    from multilora_backend.models.batch import Batch
    from multilora_backend.models.linear import FusedLinear

Mask = NDArray[np.bool_]
"""[keys of the pool]: which of them the adapters of a step have."""
Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ExtrasStep:
    """What a step has of extras."""

    mask: Mask
    slots: tuple[int, ...] = ()
    """Of its adapters."""
    row_slots: Ints | None = None
    """[T]: whose each row is."""
    sample_slots: Ints | None = None
    """[B]: whose each row is that is sampled."""


@dataclass(frozen=True, eq=False)
class Table:
    """What one adapter does to the embedding or to the head; shapes in `adapters.extras`."""

    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    affine: Tensor | None
    tokens: Tensor | None
    rows: Tensor | None


Rows = tuple[Tensor, Table]
"""Int64 rows of one adapter, and what it does to them."""


class StepExtras:
    """Belongs to a LoRA strategy, whose segments say which row is whose."""

    def __init__(self, pool: ExtrasPool | None) -> None:
        """`pool` None: there are no adapters."""
        self._pool = pool
        self._step: ExtrasStep | None = None
        self._segments: Segments | None = None
        self._indices: dict[tuple[bool, tuple[int, ...]], Tensor] = {}

    def act_on(self, batch: Batch) -> bool:
        """Whether an adapter of the batch has extras. Such a step runs eagerly: graphs launch nothing for them."""
        if self._pool is None or not self._pool.present.any():
            return False
        rows = batch.adapter_slots
        return bool(self._pool.present[rows[rows >= 0]].any())

    def plan(self, batch: Batch, segments: SegmentPlan) -> ExtrasStep | None:
        """For the step's `LoraStep`; None: its adapters have none."""
        mask = None if self._pool is None else self._pool.used_by(segments.active)
        if mask is None:
            return None
        rows = batch.adapter_slots
        return ExtrasStep(mask, segments.active, rows, rows[batch.sample_rows])

    def everything(self) -> ExtrasStep | None:
        """A step that launches all kernels that there are, for warm-up; None: it has none to launch."""
        if self._pool is None or not self._pool.nbytes:
            return None
        return ExtrasStep(np.ones(len(self._pool.index), dtype=np.bool_))

    def enter(self, step: ExtrasStep | None, segments: Segments | None) -> None:
        """From here on the methods below are about this step."""
        self._step, self._segments = step, segments
        self._indices.clear()

    def affine(self, linear: FusedLinear) -> Affine | None:
        """Gain and shift for the linear's output, after LoRA has been added to it (DoRA, trained biases)."""
        if self._step is None or self._pool is None or self._segments is None:
            return None
        row = self._pool.index[affine_spec(linear.site).key]
        if not self._step.mask[row]:
            return None
        return Affine(self._pool.values(torch.float32), self._pool.offsets(row), self._segments)

    def weights(self, *norms: str) -> list[tuple[Tensor, list[Tensor | None]]] | None:
        """All rows of the step by who has own weights for one of these norms; None in the weights: the base model's."""
        if self._step is None or self._pool is None:
            return None
        keys: list[ExtraKey] = [(WEIGHT, norm) for norm in norms]
        own = self._owners(keys)
        if not own:
            return None
        groups = [(self._rows((slot,)), [self._pool.tensor(key, slot) for key in keys]) for slot in own]
        others = self._rows(own, among=False)
        return [*groups, (others, [None] * len(keys))] if len(others) else groups

    def embedding(self) -> list[Rows] | None:
        """Rows whose adapters change the embedding, and how; None: nobody's."""
        return self._tables(EMBEDDING, sampled=False)

    def head(self) -> list[Rows] | None:
        """Likewise of the head; rows count among those that are sampled."""
        return self._tables(HEAD, sampled=True)

    def bound(self, logits: Tensor, vocabulary: int) -> None:
        """No row may draw a token that its adapter does not know. `logits` [B, at least what the head gave]."""
        tables = self.head()
        if tables is None:
            return
        logits[self._rows(self._owners(_keys(HEAD)), among=False, sampled=True), vocabulary:] = -torch.inf
        for rows, table in tables:
            known = vocabulary if table.weight is None else len(table.weight)
            logits[rows, known:] = -torch.inf

    def _tables(self, place: str, sampled: bool) -> list[Rows] | None:
        if self._step is None or self._pool is None:
            return None
        tables = []
        for slot in self._owners(_keys(place)):
            parts = [self._pool.tensor(key, slot) for key in _keys(place)]
            rows = self._rows((slot,), sampled=sampled)
            if len(rows):
                tables.append((rows, Table(*parts)))
        return tables or None

    def _owners(self, keys: Sequence[ExtraKey]) -> tuple[int, ...]:
        """Slots of the step's adapters that have any of the keys."""
        if self._step is None or self._pool is None:
            return ()
        index = [self._pool.index[key] for key in keys if key in self._pool.index]
        if not self._step.mask[index].any():
            return ()
        return tuple(slot for slot in self._step.slots if (self._pool.where[index, slot] >= 0).any())

    def _rows(self, slots: tuple[int, ...], among: bool = True, sampled: bool = False) -> Tensor:
        """Int64 on the device: rows of the step (or among those sampled) of these slots, or of all others."""
        key = (sampled, slots if among else (-1, *slots))
        if key not in self._indices:
            assert self._step is not None and self._pool is not None  # noqa: PT018
            all_rows = self._step.sample_slots if sampled else self._step.row_slots
            assert all_rows is not None
            rows = torch.from_numpy(np.flatnonzero(np.isin(all_rows, slots, invert=not among)))
            device = self._pool.values(torch.uint8).device
            rows = rows.pin_memory() if device.type == "cuda" else rows
            self._indices[key] = rows.to(device, non_blocking=True)
        return self._indices[key]


def _keys(place: str) -> list[ExtraKey]:
    """In the order of Table's fields."""
    return [(kind, place) for kind in (WEIGHT, LORA_A, LORA_B, AFFINE, TOKENS, ROWS)]
