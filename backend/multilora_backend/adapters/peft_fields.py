# SPDX-License-Identifier: Apache-2.0
"""Which fields of adapter_config.json are applied, which are harmless, and which are refused by name."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from typing import Any

from multilora_backend.adapters import checks
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

HARMLESS = frozenset(
    {
        # About training, or notes for people and tools.
        "lora_dropout",
        "inference_mode",
        "task_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "runtime_config",
        # Parameters of options that are refused when they are on.
        "qalora_group_size",
        "megatron_core",
        # About GPT-2's Conv1D, which stores its weight as (in, out). PEFT turns it off for an nn.Linear, and all that
        # is served here are those.
        "fan_in_fan_out",
        # Parameters of initialisations; `init_lora_weights` decides.
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)

REFUSED = {
    "layer_replication": "replicated layers make another base model",
    "use_qalora": "QALoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA changes the base model's weights",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA samples weights, which is not supported",
    "megatron_config": "Megatron's parallel linears are not supported",
}
"""Fields that change what the adapter computes: refused with the reason unless off (null, false or empty)."""

NOT_FOR_PARAMETERS = (
    "lora_dropout",
    "fan_in_fan_out",
    "lora_bias",
    "use_dora",
    "velora_config",
    "kasa_config",
    "alora_invocation_tokens",
)
"""Fields that PEFT refuses together with target_parameters."""

BASE_KEEPING_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights`, besides true and false, that leave the base model's weights as they are."""

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values, or beginnings of values, whose A and B were subtracted from the base model's weights."""

NOT_WITH_MICA = ("use_dora", "alora_invocation_tokens", "target_parameters")
"""MiCA is a variant of LoRA for PEFT, as these are, and no linear can be of two."""

CONVERTED_INITS = ("pissa", "olora", "corda", "lora_ga")
"""Those of them that can be converted by the adapter as it was before training, see `adapters.initial`."""


def fields_of(text: bytes) -> dict[str, Any]:
    """Raises MultiloraError if the file is no JSON object."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid("adapter_config.json", f"is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise invalid("adapter_config.json", "must be one JSON object")
    return fields


def refusals(fields: dict[str, Any], applied: Container[str]) -> Iterator[MultiloraError]:
    """What is on and is not supported, by name. Of the fields that are `applied` no value is looked at."""

    def unsupported(message: str) -> MultiloraError:
        return MultiloraError(ErrorCode.UNSUPPORTED, message)

    if fields.get("peft_type") != "LORA":
        yield unsupported(f"peft_type: only 'LORA' is supported, got {checks.short(fields.get('peft_type'))}")
    for name, value in fields.items():
        known = name in applied or name in HARMLESS or name in ("peft_type", "init_lora_weights")
        if known or value is None or value is False or value in ("", [], {}):
            continue
        yield unsupported(f"{name}: {REFUSED.get(name, f'is not understood (value {checks.short(value)})')}")
    for name in NOT_FOR_PARAMETERS if fields.get("target_parameters") else ():
        if fields.get(name):
            yield unsupported(f"{name}: PEFT has no {name} with target_parameters")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        if not converted_init(init):
            yield unsupported(f"init_lora_weights: {init!r} changes the base model's weights, and nothing converts it")
    elif init is not None and not isinstance(init, bool) and str(init).lower() not in BASE_KEEPING_INITS:
        yield unsupported(f"init_lora_weights: {checks.short(init)} is not understood")
    if fields.get("lora_bias") and (fields.get("use_dora") or not (init is None or isinstance(init, bool))):
        yield unsupported("lora_bias: PEFT does not combine it with use_dora or a named init_lora_weights")
    for name in NOT_WITH_MICA if str(init).lower() == "mica" else ():
        if fields.get(name):
            yield unsupported(f"{name}: PEFT does not combine it with init_lora_weights 'mica'")


def converted_init(init: Any) -> str:
    text = init.lower() if isinstance(init, str) else ""
    return next((name for name in CONVERTED_INITS if text.startswith(name)), "")


def base_class(mapping: Any) -> str:
    """Of PEFT's auto_mapping, which it writes when there is no task_type."""
    given = mapping if isinstance(mapping, dict) else {}
    name, library = given.get("base_model_class"), given.get("parent_library")
    known = isinstance(name, str) and isinstance(library, str) and library.startswith("transformers.models.")
    return str(name) if known and str(name).endswith("ForCausalLM") else ""
