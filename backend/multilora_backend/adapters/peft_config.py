# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json: every field of peft.LoraConfig (0.21) is applied, known to be harmless, or refused by name.

The matching rules are PEFT's, since they decide the scale of every module: what PEFT would do with the same file
is what "right" means, and the tests compare with PEFT itself.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from multilora_backend.adapters import checks
from multilora_backend.adapters.activation import invocation_tokens
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

T = TypeVar("T")

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

BIASES = ("none", "lora_only", "all")
"""Whose biases were trained: nobody's, those of the linears with LoRA, all of the model's."""

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
    target_parameters: tuple[str, ...]
    """Names and endings of names of parameters; `exclude_modules` and the layers do not touch them."""
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[re.Pattern[str], ...]
    """How a module's name starts, up to and with the layer's index."""
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]
    """Order matters in both patterns: the first that matches counts. EVA writes one for every module."""
    use_dora: bool = False
    """Rows of W + scale B A are brought to trained magnitudes (arXiv:2402.09353)."""
    lora_bias: bool = False
    """B has a bias, which is scaled as B is."""
    bias: str = "none"
    """One of BIASES."""
    modules_to_save: tuple[str, ...] = ()
    """Endings of names of modules that were trained as they are."""
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Trained rows of the modules with names that end so; "" stands for the embedding."""
    ensure_weight_tying: bool = False
    """What is done to the embedding is done to a head that shares its weight, and the other way round."""
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
        targets, parameters = fields.get("target_modules"), fields.get("target_parameters") or []
        if targets is None and not parameters:
            raise invalid("target_modules", "is required: PEFT's defaults by architecture are not applied")
        layers = fields.get("layers_to_transform")
        config = cls(
            r=checks.rank("r", fields.get("r", 8)),
            lora_alpha=checks.alpha("lora_alpha", fields.get("lora_alpha", 8)),
            use_rslora=checks.flag("use_rslora", fields.get("use_rslora", False)),
            target_modules=checks.names("target_modules", targets or ()),
            target_parameters=checks.strings("target_parameters", parameters),
            exclude_modules=checks.names("exclude_modules", fields.get("exclude_modules") or ()),
            layers_to_transform=checks.layers([layers] if isinstance(layers, int) else layers or []),
            layers_pattern=checks.layer_expressions(fields.get("layers_pattern") or ()),
            rank_pattern=checks.by_pattern("rank_pattern", fields, checks.rank),
            alpha_pattern=checks.by_pattern("alpha_pattern", fields, checks.alpha),
            use_dora=checks.flag("use_dora", fields.get("use_dora") or False),
            lora_bias=checks.flag("lora_bias", fields.get("lora_bias") or False),
            bias=checks.choice("bias", fields.get("bias") or "none", BIASES),
            modules_to_save=checks.strings("modules_to_save", fields.get("modules_to_save") or ()),
            trainable_token_indices=checks.tokens("trainable_token_indices", fields.get("trainable_token_indices")),
            ensure_weight_tying=checks.flag("ensure_weight_tying", fields.get("ensure_weight_tying") or False),
            alora_invocation_tokens=invocation_tokens(fields.get("alora_invocation_tokens")),
        )
        if isinstance(config.target_modules, str) and (config.layers_to_transform or config.layers_pattern):
            raise invalid("layers_to_transform", "cannot be used when target_modules is a string")
        if config.layers_pattern and not config.layers_to_transform:
            raise invalid("layers_pattern", "needs layers_to_transform")
        return config

    def saves(self, module: str) -> bool:
        """Whether PEFT would bring a trained copy of the module with this full name: by its last letters."""
        return any(module.endswith(name) for name in self.modules_to_save)

    def targets_table(self, module: str) -> bool:
        """Whether PEFT would put LoRA on the embedding or the head: neither counts among all linears."""
        every = isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR
        return not every and self.targets(module)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put LoRA on a linear with this full name. The output head is no linear here."""
        if self.exclude_modules and _named(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
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
    known = {*PeftConfig.__dataclass_fields__, *HARMLESS, "peft_type", "init_lora_weights"}
    for name, value in fields.items():
        if name in known or value is None or value is False or value in ("", [], {}):
            continue
        why = REFUSED.get(name, f"is not understood (value {checks.short(value)})")
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"{name}: {why}")
    for name in NOT_FOR_PARAMETERS if fields.get("target_parameters") else ():
        if fields.get(name):
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"{name}: PEFT has no {name} with target_parameters")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise MultiloraError(
            ErrorCode.UNSUPPORTED,
            f"init_lora_weights: {init!r} changes the base model's weights; convert the adapter when saving it "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)",
        )
    if init is not None and not isinstance(init, bool) and str(init).lower() not in BASE_KEEPING_INITS:
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"init_lora_weights: {checks.short(init)} is not understood")
    if fields.get("lora_bias") and (fields.get("use_dora") or not (init is None or isinstance(init, bool))):
        raise MultiloraError(
            ErrorCode.UNSUPPORTED, "lora_bias: PEFT does not combine it with use_dora or a named init_lora_weights"
        )
    for name in NOT_WITH_MICA if str(init).lower() == "mica" else ():
        if fields.get(name):
            why = f"{name}: PEFT does not combine it with init_lora_weights 'mica'"
            raise MultiloraError(ErrorCode.UNSUPPORTED, why)


def _named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_match(patterns: tuple[tuple[re.Pattern[str], T], ...], module: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
