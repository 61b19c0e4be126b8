# SPDX-License-Identifier: Apache-2.0
"""What an adapter's folder alone tells: what it is, what is in its file, and what speaks against it with any model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multilora_backend.adapters.contents import largest
from multilora_backend.adapters.folder import WEIGHTS, read_config
from multilora_backend.adapters.found import check_dtype, module_and_kind
from multilora_backend.adapters.initial import initial_folder
from multilora_backend.adapters.lineage import recorded_fingerprint
from multilora_backend.adapters.opened import OpenWeights, open_weights
from multilora_backend.adapters.peft_config import APPLIED, PeftConfig
from multilora_backend.adapters.peft_fields import HARMLESS, fields_of, refusals
from multilora_backend.adapters.tensors import TensorInfo, parse_header, tensor_of
from multilora_backend.errors import MultiloraError, invalid

_PLAIN = PeftConfig.of({"peft_type": "LORA", "target_modules": "all-linear"})
"""To look into a file whose config cannot be read."""
_SHOWN_APART = ("peft_type", "r", "lora_alpha", "target_modules")
_PAIRS = (("A", "B"), ("embedding_A", "embedding_B"))


@dataclass(frozen=True)
class ModuleTensors:
    """What the file has for one module."""

    module: str
    shapes: dict[str, tuple[int, ...]]
    """By what they are: A, B, magnitude, ..."""
    dtypes: tuple[str, ...]
    rank: int
    """By its A; experts that share a tensor count together. 0: it has no LoRA."""
    scale: float | None
    """Of B A. None: it has no LoRA, or its parameters have (target_parameters), or the config cannot be read."""
    file_bytes: int


@dataclass
class Inspection:
    folder: str
    peft_version: str = ""
    base_model: str = ""
    """base_model_name_or_path: on whatever machine it was trained."""
    revision: str = ""
    base_class: str = ""
    base_fingerprint: str = ""
    """Recorded by the file, see `adapters.lineage`; all of these are empty where nothing is recorded."""
    rank: int | None = None
    alpha: float | None = None
    target_modules: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    """All other fields of the config that are on, supported or not, but for those that do not act on inference."""
    initial: str = ""
    """The folder of the initial adapter that it is converted by, see `adapters.initial`."""
    modules: list[ModuleTensors] = field(default_factory=list)
    """As they are used: if it is converted, of twice the rank that the file has."""
    file_bytes: int = 0
    no_effect: bool | None = None
    """Every product BA is zero. None: not known, since more than A and B is in the file, or it could not be read."""
    reasons: list[str] = field(default_factory=list)
    """Why no model could be served with it."""


def inspect_folder(folder: Path, inside: Sequence[Path] = ()) -> Inspection:
    """Reads config and weights. `inside` as for `read_adapter`. Raises nothing: what is wrong is among the reasons."""
    found = Inspection(str(folder))
    if not folder.is_dir():
        found.reasons.append(invalid("folder", "does not exist").message)
        return found
    try:
        config = _take_config(found, fields_of(read_config(folder, inside)))
    except Exception as error:  # whatever a file does to its parser
        found.reasons.append(reason_of(error))
        config = None
    try:
        _take_weights(found, folder, inside, config)
    except Exception as error:  # likewise
        if (reason := reason_of(error)) not in found.reasons:
            found.reasons.append(reason)
    return found


def _take_config(found: Inspection, fields: Mapping[str, Any]) -> PeftConfig | None:
    found.peft_version = str(fields.get("peft_version") or "")
    found.base_model = str(fields.get("base_model_name_or_path") or "")
    found.revision = str(fields.get("revision") or "")
    found.target_modules = fields.get("target_modules")
    hidden = HARMLESS.union(_SHOWN_APART)
    found.settings = {name: value for name, value in fields.items() if name not in hidden and _is_on(name, value)}
    found.reasons += [error.message for error in refusals(dict(fields), APPLIED)]
    try:
        config = PeftConfig.of(dict(fields))
    except MultiloraError as error:
        found.reasons.append(error.message)
        return None
    found.rank, found.alpha, found.base_class = config.r, config.lora_alpha, config.base_class
    return config


def _is_on(name: str, value: Any) -> bool:
    defaults = {"bias": "none", "init_lora_weights": True}
    return not (value is None or value is False or value in ("", [], {}) or defaults.get(name) == value)


def _take_weights(found: Inspection, folder: Path, inside: Sequence[Path], config: PeftConfig | None) -> None:
    try:
        with open_weights(folder, config or _PLAIN, inside) as weights:
            if config is not None and config.init:
                found.initial = initial_folder(config)
            _take_tensors(found, weights, config is not None)
    except MultiloraError as error:
        if config is None or not config.init or found.initial:
            raise
        # The file can be looked at without the initial adapter, or whatever is wrong with it.
        found.reasons.append(error.message)
        _take_weights(found, folder, inside, replace(config, init=""))


def _take_tensors(found: Inspection, weights: OpenWeights, scaled: bool) -> None:
    tensors = parse_header(weights.header, WEIGHTS)
    found.file_bytes = weights.header.file_size
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for info in tensors.values():
        try:
            module, kind = module_and_kind(info.name)
            check_dtype(info)
            modules[module][kind] = info
        except MultiloraError as error:
            found.reasons.append(error.message)
    found.modules = [_module(name, own, weights.config if scaled else None) for name, own in modules.items()]
    data, _ = weights.read()
    sizes = _magnitudes([info for own in modules.values() for info in own.values()], data)
    found.reasons += [
        invalid(name, "holds NaN or infinity").message for name, size in sizes.items() if not np.isfinite(size)
    ]
    found.no_effect = _no_effect(modules, sizes)
    found.base_fingerprint = recorded_fingerprint(weights.header, WEIGHTS)


def _module(name: str, own: Mapping[str, TensorInfo], config: PeftConfig | None) -> ModuleTensors:
    a = next((own[first] for first, _ in _PAIRS if first in own), None)
    by_module = config is not None and (not config.target_parameters or config.targets(name))
    return ModuleTensors(
        module=name,
        shapes={kind: info.shape for kind, info in own.items()},
        dtypes=tuple(sorted({info.dtype for info in own.values()})),
        rank=0 if a is None or not a.shape else a.shape[0],
        scale=None if a is None or config is None or not by_module else config.scale(name),
        file_bytes=sum(info.stop - info.start for info in own.values()),
    )


def _magnitudes(tensors: Sequence[TensorInfo], data: NDArray[np.uint8]) -> dict[str, float]:
    """The largest of each, NaN if it holds one."""
    return {info.name: largest(tensor_of(info, data)) if info.stop > info.start else 0.0 for info in tensors}


def _no_effect(modules: Mapping[str, Mapping[str, TensorInfo]], sizes: Mapping[str, float]) -> bool | None:
    pairs = [(own[a], own[b]) for own in modules.values() for a, b in _PAIRS if a in own and b in own]
    if any(sizes[a.name] != 0 and sizes[b.name] != 0 for a, b in pairs):
        return False
    return True if pairs and 2 * len(pairs) == sum(map(len, modules.values())) else None


def reason_of(error: Exception) -> str:
    """In the words in which a loader thread tells it."""
    if isinstance(error, MultiloraError):
        return error.message
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return f"{type(error).__name__}: {error}"
