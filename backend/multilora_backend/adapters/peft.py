# SPDX-License-Identifier: Apache-2.0
"""From a PEFT folder to weights in device layout, strictly: every field understood, every tensor used, or refused."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multilora_backend.adapters.layout import AdapterWeights, SiteWeights, allocate, numel
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.state import Fingerprint
from multilora_backend.adapters.tensors import Header, TensorInfo, parse_header, read_data, read_header
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PICKLED_REFUSED = f"{PICKLED}: pickled weights can run code and are refused; save as {WEIGHTS}"
MAX_CONFIG_BYTES = 16 * 2**20
VERSION_DIGITS = 32
PLANS_KEPT = 64
"""Adapters that were trained alike have the same plan. Making one, 7 ms of Python at 8B, holds up the step loop."""

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """LoRA on one module: slice `slice` of site `site`. A is `[rank, in_features]`, B `[out_features, rank]`."""

    module: str
    site: int
    slice: int
    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class AdapterPlan:
    """What a folder's config and header promise: all that can be known without reading the weights."""

    parts: tuple[Part, ...]
    rank: int
    """The largest of a part."""
    numel: int
    """Elements in device layout."""


def fingerprint(folder: Path | str) -> Fingerprint:
    """Changes when the folder's content does, as far as the file system's clock and sizes tell."""

    # Strings, not paths: a watcher asks this of thousands of folders, three times as fast.
    def of(path: str) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(path)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    place = os.fspath(folder)
    return tuple(of(f"{place}/{name}") for name in (CONFIG, WEIGHTS, PICKLED))


def check_adapter(folder: Path, sites: Sequence[LoraSite], inside: Sequence[Path] = ()) -> AdapterPlan:
    """All checks that need no weights: reads the config and the header. Raises as `read_adapter` does."""
    config = PeftConfig.parse(_read_config(folder, inside))
    with member(folder, WEIGHTS, inside).open("rb") as file:
        return _plan(config, read_header(file, WEIGHTS), tuple(sites))


def read_adapter(
    folder: Path,
    sites: Sequence[LoraSite],
    dtype: torch.dtype,
    pin: bool = False,
    inside: Sequence[Path] = (),
    sha256: str = "",
) -> AdapterWeights:
    """Reads, checks and lays out an adapter, in pinned memory if `pin`.

    `inside`: resolved folders that links may lead to as well. `sha256`: what the weights' file must have; empty: any.

    Raises MultiloraError with the reason if PEFT would compute anything else from this folder than we could, or
    OSError if a file cannot be read. Scales are folded into B in float32 before the cast to `dtype`.
    """
    text = _read_config(folder, inside)
    config = PeftConfig.parse(text)
    with member(folder, WEIGHTS, inside).open("rb") as file:
        header = read_header(file, WEIGHTS)
        plan = _plan(config, header, tuple(sites))
        data = read_data(file, header, WEIGHTS)
    content = hashlib.sha256(data.data)  # which CPUs have instructions for: half the time of blake2b
    if sha256:
        check_sha256(content.hexdigest(), sha256)
    version = hashlib.sha256(text + content.digest()).hexdigest()[:VERSION_DIGITS]
    ranks: Counter[int] = Counter()
    for part in plan.parts:
        ranks[part.site] += part.rank
    buffers, weights = allocate(sites, ranks, plan.rank, dtype, pin)
    for index, laid_out in enumerate(weights):
        # The usual adapter, of one rank and on every module, covers its memory: nothing is written twice.
        if laid_out is not None and ranks[index] < len(laid_out.a):
            laid_out.a.zero_()
            laid_out.b.zero_()
    effects = [_fill(weights[part.site], part, sites[part.site], data) for part in plan.parts]
    invocation = config.alora_invocation_tokens
    return AdapterWeights(version, plan.rank, weights, buffers, not any(effects), invocation)


@lru_cache(maxsize=PLANS_KEPT)
def _plan(config: PeftConfig, header: Header, sites: tuple[LoraSite, ...]) -> AdapterPlan:
    """Matches the config, the file's tensors and the model against each other."""
    tensors = parse_header(header, WEIGHTS)
    places = {m: (i, j) for i, site in enumerate(sites) for j, m in enumerate(site.modules)}
    found: dict[tuple[str, str], TensorInfo] = {}
    for name, info in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise MultiloraError(
                ErrorCode.UNSUPPORTED,
                f"{name}: is no lora_A or lora_B weight of a linear; embeddings, biases, magnitudes and full weights "
                "are not supported yet",
            )
        module = match["module"]
        if module not in places:
            raise invalid(name, f"the base model has no linear {module} that LoRA can act on")
        if not config.targets(module):
            raise invalid(name, f"target_modules of {CONFIG} does not name {module}")
        if info.dtype not in _DTYPES:
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"{name}: dtype {info.dtype} is not supported")
        if found.setdefault((module, match["part"]), info) is not info:
            raise invalid(name, "occurs twice, with and without the adapter's name")
    parts = []
    for module, (i, j) in places.items():
        if not config.targets(module):
            continue
        rank, site = config.rank(module), sites[i]
        a = _expect(found, module, "A", (rank, site.in_features))
        b = _expect(found, module, "B", (site.out_features[j], rank))
        parts.append(Part(module, i, j, rank, config.scale(module), a, b))
    if not parts:
        raise invalid("target_modules", "names no linear of the base model")
    rank = max(part.rank for part in parts)
    touched = [sites[i] for i in {part.site for part in parts}]
    return AdapterPlan(tuple(parts), rank, sum(numel(site, rank) for site in touched))


def _expect(found: dict[tuple[str, str], TensorInfo], module: str, part: str, shape: tuple[int, int]) -> TensorInfo:
    info = found.get((module, part))
    if info is None:
        raise invalid(f"{module}.lora_{part}", f"is missing in {WEIGHTS}, and target_modules names the module")
    if info.shape != shape:
        raise invalid(
            info.name,
            f"has shape {list(info.shape)}, expected {list(shape)} from the base model and the rank in {CONFIG}",
        )
    return info


def _fill(weights: SiteWeights | None, part: Part, site: LoraSite, data: NDArray[np.uint8]) -> bool:
    """Writes one module's A and scaled B. False if their product is zero."""
    if weights is None:
        raise RuntimeError(f"no room was laid out for {part.module}")
    first = sum(site.out_features[: part.slice])
    row = part.slice * len(weights.b)
    a = weights.a[row : row + part.rank]
    b = weights.b[: part.rank, first : first + site.out_features[part.slice]]
    source_a, source_b = _tensor(part.a, data), _tensor(part.b, data)
    a.copy_(source_a)
    b.copy_((source_b.float() * part.scale).T)
    largest = []
    for info, source, laid_out in ((part.a, source_a, a), (part.b, source_b, b)):
        largest.append(_largest(laid_out))
        if not math.isfinite(largest[-1]):
            if not math.isfinite(_largest(source)):
                raise invalid(info.name, "holds NaN or infinity")
            raise invalid(info.name, f"does not fit {laid_out.dtype} with the scale {part.scale:g}")
    return all(largest)


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one. Several times faster on the CPU than isfinite, all and any."""
    low, high = torch.aminmax(tensor)
    return max(abs(float(low)), abs(float(high)))


def _tensor(info: TensorInfo, data: NDArray[np.uint8]) -> Tensor:
    dtype = _DTYPES[info.dtype]
    # A copy when the file does not align its tensors, as the format allows.
    source = data[info.start : info.stop]
    return torch.from_numpy(source.copy() if info.start % dtype.itemsize else source).view(dtype).view(info.shape)


def check_sha256(digest: str, expected: str) -> None:
    """Raises MultiloraError if they differ."""
    if digest != expected:
        raise invalid("sha256", f"{WEIGHTS} has {digest}, expected {expected}")


def _read_config(folder: Path, inside: Sequence[Path]) -> bytes:
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
