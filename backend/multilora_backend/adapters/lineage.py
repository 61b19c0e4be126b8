# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter was trained on the model that runs, as far as its folder says on which it was.

PEFT records the base's name, which differs from machine to machine and proves nothing, and without a task_type its
class. Some trainers leave the base's config.json in the folder. Nobody records a hash; who wants one checked puts
`base_fingerprint` into the metadata of the adapter's safetensors file, under FINGERPRINT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.folder import member
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.tensors import Header, metadata_of
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

BASE_CONFIG = "config.json"
FINGERPRINT = "base_model_fingerprint"
MAX_CONFIG_BYTES = 2**20

ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
)
"""Fields of config.json that make another model of it. Others (rope, epsilons) are spelled differently by versions."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def recorded_fingerprint(header: Header, label: str) -> str:
    """Of the base model, by the adapter's file, which `label` names; empty if it has none. Raises MultiloraError."""
    if FINGERPRINT.encode() not in header.raw:  # nearly always: understanding the header takes a hundred times as long
        return ""
    value = metadata_of(header, label).get(FINGERPRINT, "")
    if value and (not isinstance(value, str) or not _SHA256.fullmatch(value)):
        raise invalid(FINGERPRINT, f"must be 64 hexadecimal digits in lower case, got {repr(value)[:80]}")
    return str(value)


def check_recorded(config: PeftConfig, header: Header, label: str, base: BaseModel | None) -> None:
    """Raises MultiloraError if the adapter names another base model, by its class or its fingerprint."""
    identity = None if base is None else base.identity
    if identity is not None and config.base_class not in ("", identity.class_name):
        raise invalid("auto_mapping", f"the adapter is for a {config.base_class}, the model is a {identity.class_name}")
    recorded = recorded_fingerprint(header, label)
    if not recorded:
        return
    if identity is None:
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"{FINGERPRINT}: needs the base model, which is not loaded")
    if recorded != identity.fingerprint:
        raise invalid(FINGERPRINT, f"the adapter is for {recorded}, the model is {identity.fingerprint}")


def base_config_beside(folder: Path, inside: Sequence[Path] = ()) -> Mapping[str, Any]:
    """Fields of a model's config.json in the folder; empty if there is none. Anything else of that name says nothing.

    PEFT does not look at it, so an adapter is not refused for one that cannot be read.
    """
    if not (folder / BASE_CONFIG).exists():
        return {}
    try:
        path = member(folder, BASE_CONFIG, inside)
        fields = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_CONFIG_BYTES else None
    except (MultiloraError, OSError, ValueError, RecursionError):
        return {}
    if not isinstance(fields, dict) or "model_type" not in fields:
        return {}
    inner = fields.get("text_config")
    return inner if isinstance(inner, dict) else fields


def check_base_config(fields: Mapping[str, Any], base: BaseModel) -> None:
    """Raises MultiloraError that names the field in which the config beside the adapter is not the running model's."""
    identity = base.identity
    if identity is None:
        return
    for name in ARCHITECTURE:
        trained, running = _field(fields, name), _field(identity.settings, name)
        if trained is not None and running is not None and trained != running:
            raise _other(name, trained, running)


def check_vocabulary(fields: Mapping[str, Any], base: BaseModel) -> None:
    """Of an adapter that has no tables of its own. Raises MultiloraError if it was trained with more tokens.

    With fewer it may have been, as embeddings are padded.
    """
    trained = fields.get("vocab_size")
    running = None if base.identity is None else base.identity.settings.get("vocab_size")
    if isinstance(trained, int) and isinstance(running, int) and trained > running:
        raise _other("vocab_size", trained, running)


def _field(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name)
    # As Mixtral has it, and transformers 5 for all.
    return fields.get("num_local_experts") if value is None and name == "num_experts" else value


def _other(name: str, trained: Any, running: Any) -> MultiloraError:
    return invalid(BASE_CONFIG, f"{name} is {repr(trained)[:80]}, the model that runs has {running!r}")
