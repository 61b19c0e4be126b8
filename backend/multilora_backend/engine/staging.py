# SPDX-License-Identifier: Apache-2.0
"""Small arrays between host and device without waiting: pinned buffers, used again once their copies are done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton-lang compiles a second kernel for pointers that are not aligned so: no request should wait for that."""
SMALLEST_BUFFER = 4096

_DTYPES = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
}


class HostBuffer:
    """Bytes on the host, pinned if the device is a GPU, and the event that says when its copy is done."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.array = self.memory.numpy()
        self.event = torch.cuda.Event() if pinned else None


class Staging:
    """One thread's copies on its current stream. `Copies` is one launch's share of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned = device.type == "cuda"
        self._free: defaultdict[int, list[HostBuffer]] = defaultdict(list)

    def take(self, size: int) -> HostBuffer:
        rounded = max(SMALLEST_BUFFER, 1 << max(size - 1, 0).bit_length())
        free = self._free[rounded]
        return free.pop() if free else HostBuffer(rounded, self._pinned)

    def give(self, buffer: HostBuffer) -> None:
        """Only when the device is done with it."""
        self._free[len(buffer.array)].append(buffer)


class Copies:
    """The copies of one launch. Its buffers go back to the pool in `wait`, or to the garbage if nobody waits."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._buffers: list[HostBuffer] = []

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """The arrays (1-D; float32, int32 or int64) on the device, by one copy; none for no arrays."""
        if not arrays:
            return {}
        starts, size = _layout([array.nbytes for array in arrays.values()])
        buffer = self._take(size)
        for array, start in zip(arrays.values(), starts, strict=True):
            buffer.array[start : start + array.nbytes] = array.view(np.uint8)
        device = torch.empty(size, dtype=torch.uint8, device=self._staging.device)
        device.copy_(buffer.memory[:size], non_blocking=True)
        return {
            name: device[start : start + array.nbytes].view(_DTYPES[array.dtype])
            for (name, array), start in zip(arrays.items(), starts, strict=True)
        }

    def download(self, *tensors: Tensor) -> list[Tensor]:
        """Host tensors that hold these (contiguous) once `wait` has returned."""
        starts, size = _layout([tensor.nbytes for tensor in tensors])
        buffer = self._take(size)
        copies = []
        for tensor, start in zip(tensors, starts, strict=True):
            copy = buffer.memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(copy.copy_(tensor, non_blocking=True))
        if buffer.event is not None:
            buffer.event.record()
        return copies

    def wait(self) -> None:
        """Until the last download has arrived; then everything before it on the stream is done, too."""
        event = self._buffers[-1].event
        if event is not None:
            event.synchronize()

    def release(self) -> None:
        """The downloads' host tensors end here."""
        for buffer in self._buffers:
            self._staging.give(buffer)
        self._buffers.clear()

    def _take(self, size: int) -> HostBuffer:
        buffer = self._staging.take(size)
        self._buffers.append(buffer)
        return buffer


def _layout(sizes: list[int]) -> tuple[list[int], int]:
    """Where each of these many bytes starts when they lie one behind the other, aligned, and where the last ends."""
    ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    return [0, *ends[:-1]], ends[-1]
