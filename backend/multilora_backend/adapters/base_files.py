# SPDX-License-Identifier: Apache-2.0
"""The base model's own safetensors files: which they are, and a fingerprint by which an adapter can name its base."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from multilora_backend.adapters.tensors import TensorInfo, parse_header, read_header
from multilora_backend.errors import invalid

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLES = 4
"""Pieces of a tensor that the fingerprint reads, spread from its beginning to its end,"""
SAMPLE_BYTES = 4096
"""of this size. For an 8B model this takes 14 ms, where hashing all of it takes 21 s of a core. Training shows, since a
byte of one piece is enough."""


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers would read, by name. Raises MultiloraError if one is missing."""
    index = folder / INDEX
    names = {SINGLE}
    if not (folder / SINGLE).is_file() and index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    for name in names:
        if not (folder / name).is_file():
            raise invalid("model", f"{folder} holds no {name}")
    return [folder / name for name in sorted(names)]


def stored_tensors(folder: Path) -> Iterator[tuple[Path, TensorInfo]]:
    """Each tensor and its file. Raises MultiloraError if a file is missing or not whole."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            header = read_header(file, path.name)
        for info in parse_header(header, path.name).values():
            yield path, info


def base_fingerprint(folder: Path) -> str:
    """SHA-256, in hexadecimal, of every tensor's name, dtype, shape and samples, in the order of the names.

    It does not depend on how the tensors are spread over files. It tells models from each other, and does not show that
    a file is whole or that nobody has forged it. Raises as `stored_tensors`, or OSError.
    """
    digest = hashlib.sha256()
    for path, info in sorted(stored_tensors(folder), key=lambda stored: stored[1].name):
        digest.update(json.dumps([info.name, info.dtype, info.shape]).encode())
        with path.open("rb", buffering=0) as file:
            for start, size in samples(info):
                digest.update(os.pread(file.fileno(), size, start))
    return digest.hexdigest()


def samples(info: TensorInfo) -> list[tuple[int, int]]:
    """(start, bytes) of the pieces in the file: all of a small tensor, else the first bytes, the last, and between."""
    size = info.stop - info.start
    if size <= SAMPLES * SAMPLE_BYTES:
        return [(info.start, size)]
    last = size - SAMPLE_BYTES
    return [(info.start + last * i // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]
