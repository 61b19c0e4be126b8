# SPDX-License-Identifier: Apache-2.0
"""Reads safetensors files without mapping them: a mapped file that shrinks under its reader kills the process.

The format: a little-endian uint64 N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multilora_backend.documents import without_duplicates
from multilora_backend.errors import MultiloraError, invalid

ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that an adapter's tensors may have."""
MAX_KEPT_BYTES = 512 * 2**20
"""Memory that a thread keeps for the next file; larger files get their own."""

_thread = threading.local()

MAX_HEADER = 100 * 10**6
"""The reference implementation's limit."""


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dtype: str
    """As the format spells it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin in the file, and"""
    stop: int
    """where they end."""


@dataclass(frozen=True)
class Header:
    """As it is in the file: adapters that were trained alike have the same, and understanding it takes milliseconds."""

    raw: bytes
    """The file up to the first tensor."""
    file_size: int


def read_header(file: BufferedReader, label: str) -> Header:
    """Raises MultiloraError if the file is no safetensors file or ends before its header does; `label` names it."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise invalid(label, f"is truncated: {size} bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise invalid(label, f"is not a safetensors file: it claims a header of {length} bytes")
    raw = file.read(length)
    if len(raw) < length:
        raise invalid(label, f"is truncated: its header has {length} bytes, the file {size}")
    return Header(prefix + raw, size)


def parse_header(header: Header, label: str) -> dict[str, TensorInfo]:
    """What is in the file, by name. Raises MultiloraError unless it is a whole safetensors file; `label` names it."""
    entries, size = _entries(header, label), header.file_size
    begin = len(header.raw)
    tensors = {name: _info(name, entry, begin, label) for name, entry in entries.items() if name != "__metadata__"}
    end = begin
    for info in sorted(tensors.values(), key=lambda info: info.start):
        if info.start != end:
            raise invalid(label, f"is corrupt: {info.name} begins at byte {info.start}, not at {end}")
        end = info.stop
    if end != size:
        kind = "truncated" if size < end else "corrupt"
        raise invalid(label, f"is {kind}: its tensors end at byte {end}, the file at {size}")
    return tensors


def metadata_of(header: Header, label: str) -> dict[str, Any]:
    """What the file says about itself. Raises MultiloraError if the header cannot be read; `label` names the file."""
    metadata = _entries(header, label).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _entries(header: Header, label: str) -> dict[str, Any]:
    try:
        entries = json.loads(header.raw[8:], object_pairs_hook=without_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise invalid(label, f"is corrupt: its header is no JSON object ({error})") from error
    return entries


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, Any]) -> Header:
    """Of a file with tensors of these dtypes and shapes, one after the other in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return Header(struct.pack("<Q", len(text)) + text, 8 + len(text) + end)


def read_data(file: BufferedReader, header: Header, label: str) -> NDArray[np.uint8]:
    """The whole file, until the next call in this thread: memory is used again.

    Raises MultiloraError if it is not the file any more that the header was read from.
    """
    data = _memory(header.file_size)
    file.seek(0)
    if file.readinto(data.data) != header.file_size or data[: len(header.raw)].tobytes() != header.raw:
        raise invalid(label, "changed while it was read")
    return data


def tensor_of(info: TensorInfo, data: NDArray[np.uint8]) -> Tensor:
    """A view of the file's content; a copy where the file does not align its tensors, as the format allows."""
    dtype = DTYPES[info.dtype]
    source = data[info.start : info.stop]
    return torch.from_numpy(source.copy() if info.start % dtype.itemsize else source).view(dtype).view(info.shape)


def _memory(nbytes: int) -> NDArray[np.uint8]:
    """Giving 84 MB back to the system takes milliseconds under the interpreter's lock, in which no step can run."""
    if nbytes > MAX_KEPT_BYTES:
        return np.empty(nbytes, dtype=np.uint8)
    kept: NDArray[np.uint8] | None = getattr(_thread, "memory", None)
    if kept is None or len(kept) < nbytes:
        # A power of two: or else every adapter that is a little larger than all before it would need new memory.
        kept = _thread.memory = np.empty(1 << (nbytes - 1).bit_length(), dtype=np.uint8)
    return kept[:nbytes]


def _info(name: str, entry: Any, begin: int, label: str) -> TensorInfo:
    def corrupt(problem: str) -> MultiloraError:
        return invalid(label, f"is corrupt: {name}: {problem}")

    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError) as error:
        raise corrupt("needs dtype, shape and two data_offsets") from error
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise corrupt(f"unknown dtype {dtype!r}")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise corrupt("shape and data_offsets must be whole numbers, 0 or more")
    if math.prod(shape) * ITEMSIZE[dtype] != stop - start:
        raise corrupt(f"{stop - start} bytes for {dtype} {list(shape)}")
    return TensorInfo(name, dtype, tuple(shape), begin + start, begin + stop)
