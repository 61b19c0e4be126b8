# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json: every field of peft.LoraConfig (0.21) is applied, known to be harmless, or refused by name.

The matching rules are PEFT's, since they decide the scale of every module: what PEFT would do with the same file
is what "right" means, and the tests compare with PEFT itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from multilora_backend.adapters.activation import invocation_tokens
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

T = TypeVar("T")

MAX_RANK = 4096
ALL_LINEAR = "all-linear"

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
        "ensure_weight_tying",
        # Parameters of initialisations; `init_lora_weights` decides.
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)

REFUSED = {
    "use_dora": "DoRA is not supported yet",
    "lora_bias": "a bias beside lora_B is not supported yet",
    "fan_in_fan_out": "weights stored as (in, out) are not supported yet",
    "modules_to_save": "fully trained modules are not supported yet",
    "trainable_token_indices": "trained token embeddings are not supported yet",
    "target_parameters": "LoRA on parameters that are not linears (experts) is not supported yet",
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

BASE_KEEPING_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights`, besides true and false, that leave the base model's weights as they are."""

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values, or beginnings of values, whose A and B were subtracted from the base model's weights."""

_ANY_LAYERS = (re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\."),)
"""Without layers_pattern the first number in a module's name is its layer."""


@dataclass(frozen=True)
class PeftConfig:
    """The fields that act on inference, checked, with PEFT's defaults and PEFT's matching."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    """A regular expression, "all-linear", or names and endings of names."""
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[re.Pattern[str], ...]
    """How a module's name starts, up to and with the layer's index."""
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]
    """Order matters in both patterns: the first that matches counts. EVA writes one for every module."""
    alora_invocation_tokens: tuple[int, ...] = ()
    """From their last occurrence in the prompt on the adapter acts; empty: everywhere."""

    @classmethod
    def parse(cls, text: bytes) -> PeftConfig:
        """Raises MultiloraError that names the field if the adapter could not be served exactly as PEFT would."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise invalid("adapter_config.json", f"is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise invalid("adapter_config.json", "must be one JSON object")
        _refuse(fields)
        targets = fields.get("target_modules")
        if targets is None:
            raise invalid("target_modules", "is required: PEFT's defaults by architecture are not applied")
        layers = fields.get("layers_to_transform")
        config = cls(
            r=_rank("r", fields.get("r", 8)),
            lora_alpha=_alpha("lora_alpha", fields.get("lora_alpha", 8)),
            use_rslora=_flag("use_rslora", fields.get("use_rslora", False)),
            target_modules=_names("target_modules", targets),
            exclude_modules=_names("exclude_modules", fields.get("exclude_modules") or ()),
            layers_to_transform=_layers([layers] if isinstance(layers, int) else layers or []),
            layers_pattern=_layer_expressions(fields.get("layers_pattern") or ()),
            rank_pattern=_by_pattern("rank_pattern", fields, _rank),
            alpha_pattern=_by_pattern("alpha_pattern", fields, _alpha),
            alora_invocation_tokens=invocation_tokens(fields.get("alora_invocation_tokens")),
        )
        if isinstance(config.target_modules, str) and (config.layers_to_transform or config.layers_pattern):
            raise invalid("layers_to_transform", "cannot be used when target_modules is a string")
        if config.layers_pattern and not config.layers_to_transform:
            raise invalid("layers_pattern", "needs layers_to_transform")
        return config

    def targets(self, module: str) -> bool:
        """Whether PEFT would put LoRA on a linear with this full name. The output head is no linear here."""
        if self.exclude_modules and _named(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == ALL_LINEAR or _named(self.target_modules, module)
        # A full name counts whatever the layers are.
        return module in self.target_modules or (_named(self.target_modules, module) and self._in_layers(module))

    def rank(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        return _first_match(self.alpha_pattern, module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        matches = (pattern.match(module) for pattern in self.layers_pattern or _ANY_LAYERS)
        match = next((m for m in matches if m), None)
        return match is not None and int(match["idx"]) in self.layers_to_transform


def _refuse(fields: dict[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise MultiloraError(
            ErrorCode.UNSUPPORTED, f"peft_type: only 'LORA' is supported, got {fields.get('peft_type')!r}"
        )
    known = {*PeftConfig.__dataclass_fields__, *HARMLESS, "peft_type", "bias", "init_lora_weights"}
    for name, value in fields.items():
        if name in known or value is None or value is False or value in ("", [], {}):
            continue
        why = REFUSED.get(name, f"is not understood (value {_short(value)})")
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"{name}: {why}")
    bias = fields.get("bias", "none")
    if bias != "none":
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"bias: only 'none' is supported yet, got {_short(bias)}")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise MultiloraError(
            ErrorCode.UNSUPPORTED,
            f"init_lora_weights: {init!r} changes the base model's weights; convert the adapter when saving it "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)",
        )
    if init is not None and not isinstance(init, bool) and str(init).lower() not in BASE_KEEPING_INITS:
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"init_lora_weights: {_short(init)} is not understood")


def _named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_match(patterns: tuple[tuple[re.Pattern[str], T], ...], module: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _rank(field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise invalid(field, f"must be a whole number from 1 to {MAX_RANK}, got {_short(value)}")
    return value


def _alpha(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
        raise invalid(field, f"must be a number within 1e9, got {_short(value)}")
    return value


def _flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid(field, f"must be true or false, got {_short(value)}")
    return value


def _names(field: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        _compile(field, value, value)
        return value
    return _strings(field, value)


def _layer_expressions(value: Any) -> tuple[re.Pattern[str], ...]:
    names = _strings("layers_pattern", [value] if isinstance(value, str) else value)
    return tuple(_compile("layers_pattern", name, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in names)


def _strings(field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise invalid(field, f"must be a string or a list of strings, got {_short(value)}")
    return tuple(value)


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise invalid("layers_to_transform", f"must be a layer's index or a list of them, got {_short(value)}")
    return tuple(value)


def _by_pattern(
    field: str, fields: dict[str, Any], checked: Callable[[str, Any], T]
) -> tuple[tuple[re.Pattern[str], T], ...]:
    """PEFT's rule: a key is a regular expression for the end of the name, from a dot on."""
    given = fields.get(field) or {}
    if not isinstance(given, dict):
        raise invalid(field, f"must map names to numbers, got {_short(given)}")
    return tuple(
        (_compile(field, key, rf"(.*\.)?({key})$"), checked(f"{field}[{key!r}]", value)) for key, value in given.items()
    )


def _compile(field: str, given: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise invalid(field, f"{_short(given)} is not a regular expression: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
