# SPDX-License-Identifier: Apache-2.0
"""An adapter's weights before they are read: one file, or two that are converted to one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from multilora_backend.adapters.folder import WEIGHTS, member
from multilora_backend.adapters.initial import (
    convert,
    converted_config,
    converted_header,
    initial_folder,
    require_initial,
)
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.tensors import Header, read_data, read_header


@dataclass(frozen=True)
class OpenWeights:
    """An adapter's file, or what PEFT would make of it and the initial adapter's: see `initial`."""

    config: PeftConfig
    header: Header
    read: Callable[[], tuple[NDArray[np.uint8], tuple[bytes, ...]]]
    """The file's content, until the next read in this thread, and the SHA-256 of each file that was read."""


@contextmanager
def open_weights(folder: Path, config: PeftConfig, inside: Sequence[Path]) -> Iterator[OpenWeights]:
    """Reads the headers. Raises as `read_adapter`."""
    with ExitStack() as files:
        file = files.enter_context(member(folder, WEIGHTS, inside).open("rb"))
        header = read_header(file, WEIGHTS)

        def read() -> tuple[NDArray[np.uint8], tuple[bytes, ...]]:
            data = read_data(file, header, WEIGHTS)
            # Which CPUs have instructions for: half the time of blake2b.
            return data, (hashlib.sha256(data.data).digest(),)

        if not config.init:
            yield OpenWeights(config, header, read)
            return
        require_initial(folder, config)
        label = f"{initial_folder(config)}/{WEIGHTS}"
        other = files.enter_context(member(folder, label, inside).open("rb"))
        initial = read_header(other, label)
        result = converted_header(config, header, initial, (WEIGHTS, label))

        def read_both() -> tuple[NDArray[np.uint8], tuple[bytes, ...]]:
            data, digest = read()
            data = data.copy()  # or the second file would be read over it
            first = read_data(other, initial, label)
            converted = convert(result, header, data, initial, first, label)
            return converted, (*digest, hashlib.sha256(first.data).digest())

        yield OpenWeights(converted_config(config), result, read_both)
