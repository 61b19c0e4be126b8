# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter was trained on the model that runs, as far as its folder says on which it was.

PEFT records the base's name, which differs from machine to machine and proves nothing, and without a task_type its
class. Some trainers leave the base's config.json in the folder. Nobody records a hash; who wants one checked puts
`base_fingerprint` into the metadata of the adapter's safetensors file, under FINGERPRINT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multilora_backend.adapters.base import BaseModel
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
    "num_local_experts",
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


def check_base_config(path: Path, base: BaseModel) -> Mapping[str, Any]:
    """Compares a config.json beside the adapter with the running model's; returns it.

    Raises MultiloraError that names the field in which they differ.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise invalid(BASE_CONFIG, f"is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise invalid(BASE_CONFIG, f"is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise invalid(BASE_CONFIG, "must be one JSON object")
    if isinstance(fields.get("text_config"), dict):
        fields = fields["text_config"]
    if base.identity is not None:
        for name in ARCHITECTURE:
            _compare(name, fields.get(name), base.identity.settings.get(name))
    return fields


def check_vocabulary(fields: Mapping[str, Any], base: BaseModel, own: int) -> None:
    """`own`: tokens that the adapter brings a table for; 0: it knows the base model's. Raises MultiloraError."""
    if base.identity is not None:
        _compare("vocab_size", fields.get("vocab_size"), own or base.identity.settings.get("vocab_size"))


def _compare(name: str, trained: Any, running: Any) -> None:
    if trained is not None and running is not None and trained != running:
        raise invalid(BASE_CONFIG, f"{name} is {repr(trained)[:80]}, the model that runs has {running!r}")
