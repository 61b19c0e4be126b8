# SPDX-License-Identifier: Apache-2.0
"""Device memory for extras: one arena, and a table that says where each slot's adapter has each of its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multilora_backend.adapters.extras import ALIGNMENT, ExtraKey, Extras, ExtraSpec
from multilora_backend.adapters.layout import BUFFER_BYTES

NOTHING = -1


class ExtrasPool:
    """Memory only: who may lie where is the manager's business, and what has to wait for what the device pool's."""

    def __init__(self, keys: Sequence[ExtraKey], budget_bytes: int, num_slots: int, device: torch.device) -> None:
        """`keys`: of all places where an extra may act. An arena of 0 bytes holds no adapter with extras."""
        self.index = {key: i for i, key in enumerate(keys)}
        """Row of each key in the table."""
        self._arena = torch.zeros(budget_bytes // ALIGNMENT * ALIGNMENT, dtype=torch.uint8, device=device)
        self._table = torch.full((len(keys), num_slots), NOTHING, dtype=torch.int32, device=device)
        self._rows = self._table.unbind()
        self.where: NDArray[np.int32] = np.full((len(keys), num_slots), NOTHING, dtype=np.int32)
        """[keys, slots]: the table as it will be when all writes are done."""
        self.present: NDArray[np.bool_] = np.zeros(num_slots, dtype=np.bool_)
        """Slots whose adapter has extras."""
        self._specs: dict[int, dict[ExtraKey, ExtraSpec]] = {}

    @property
    def nbytes(self) -> int:
        return len(self._arena)

    def values(self, dtype: torch.dtype) -> Tensor:
        """All of the arena as one vector; an offset of the table is ALIGNMENT / itemsize elements."""
        return self._arena.view(dtype)

    def offsets(self, row: int) -> Tensor:
        """int32 [slots]: where each slot's adapter has the tensor of that row of the table; NOTHING if it has none."""
        return self._rows[row]

    def tensor(self, key: ExtraKey, slot: int) -> Tensor | None:
        """What the slot's adapter has there: a view of the arena, until the adapter is moved or gone."""
        spec = self._specs.get(slot, {}).get(key)
        if spec is None:
            return None
        begin = int(self.where[self.index[key], slot]) * ALIGNMENT
        used = math.prod(spec.shape) * spec.dtype.itemsize
        return self._arena[begin : begin + used].view(spec.dtype).view(spec.shape)

    def used_by(self, slots: Sequence[int]) -> NDArray[np.bool_] | None:
        """[keys]: which of them some of these slots' adapters have. None: none of any."""
        own = np.asarray(slots, dtype=np.int64)
        if not self.present[own].any():
            return None
        return (self.where[:, own] != NOTHING).any(axis=1)

    def write(self, extras: Extras | None, slot: int, start: int) -> None:
        """Queues copies of an adapter's extras to byte `start` of the arena, and of its column of the table.

        Raises KeyError for a key that the model does not have, ValueError if the arena ends before the extras do.
        """
        column = torch.full((len(self.index),), NOTHING, dtype=torch.int32)
        if extras is not None:
            if start % ALIGNMENT or start + extras.size > self.nbytes:
                raise ValueError(f"start: {extras.size} bytes at {start} do not fit {self.nbytes} bytes")
            for key, offset in extras.offsets.items():
                column[self.index[key]] = start // ALIGNMENT + offset
            # In pieces, so that a step's own small copies do not wait for a large embedding.
            target = self._arena[start : start + extras.size]
            for piece, source in zip(target.split(BUFFER_BYTES), extras.buffer.data.split(BUFFER_BYTES), strict=True):
                piece.copy_(source, non_blocking=True)
        tensors = {} if extras is None else extras.tensors
        self._specs[slot] = {key: ExtraSpec(key, tuple(t.shape), t.dtype) for key, t in tensors.items()}
        self.where[:, slot] = column.numpy()
        self.present[slot] = extras is not None
        # Also for an adapter without extras: the slot's last one may have had some.
        column = column.pin_memory() if self._arena.is_cuda else column
        self._table[:, slot].copy_(column, non_blocking=True)

    def move(self, slot: int, begin: int, start: int, size: int) -> None:
        """Copies an adapter's `size` bytes from byte `begin` to byte `start`; see `DevicePool.move`."""
        # Pieces no longer than the way, beginning at the end that leads: none is overwritten before it was copied.
        piece = min(size, abs(start - begin))
        offsets = range(0, size, piece) if piece else range(0)
        for offset in offsets if start < begin else reversed(offsets):
            count = min(piece, size - offset)
            target = self._arena[start + offset : start + offset + count]
            target.copy_(self._arena[begin + offset : begin + offset + count])
        shift = (start - begin) // ALIGNMENT
        own = self.where[:, slot] != NOTHING
        self.where[own, slot] += shift
        column = self._table[:, slot]
        column.add_((column != NOTHING) * shift)

    def clear(self, slot: int) -> None:
        """The slot has no adapter any more. Nothing reads its column until it has another one."""
        self.where[:, slot] = NOTHING
        self.present[slot] = False
        self._specs.pop(slot, None)
