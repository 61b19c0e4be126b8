# SPDX-License-Identifier: Apache-2.0
"""The files of an adapter's folder, and which of them may be opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from multilora_backend.errors import ErrorCode, MultiloraError, invalid

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PICKLED_REFUSED = f"{PICKLED}: pickled weights can run code and are refused; save as {WEIGHTS}"
MAX_CONFIG_BYTES = 16 * 2**20


def read_config(folder: Path, inside: Sequence[Path]) -> bytes:
    """adapter_config.json as it is. Raises MultiloraError or OSError if it cannot be read."""
    if not folder.is_dir():
        raise invalid("folder", "does not exist")
    path = member(folder, CONFIG, inside)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise invalid(CONFIG, f"is larger than {MAX_CONFIG_BYTES} bytes")
    return path.read_bytes()


def member(folder: Path, name: str, inside: Sequence[Path] = ()) -> Path:
    """A regular file of the folder, links followed.

    Links may lead within the folder, as in mounted Kubernetes volumes, or within `inside`, as in the snapshots of a
    Hugging Face cache. Raises MultiloraError for every other, and for what is missing or no file.
    """
    path = folder / name
    if not path.exists():
        if name == WEIGHTS and (folder / PICKLED).exists():
            raise MultiloraError(ErrorCode.UNSUPPORTED, PICKLED_REFUSED)
        raise invalid(name, "is missing")
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in (folder.resolve(), *inside)):
        raise invalid(name, "is a symbolic link that leaves the adapter's folder and all of adapter_roots")
    if not real.is_file():
        raise invalid(name, "is not a regular file")
    return real
