# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json: every field of peft.LoraConfig (0.21) is applied, known to be harmless, or refused by name.

The matching rules are PEFT's, since they decide the scale of every module: what PEFT would do with the same file
is what "right" means, and the tests compare with PEFT itself.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from multilora_backend.adapters import checks
from multilora_backend.adapters.activation import invocation_tokens
from multilora_backend.adapters.peft_fields import base_class, converted_init, fields_of, refusals
from multilora_backend.errors import invalid

T = TypeVar("T")

ALL_LINEAR = "all-linear"

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
    init: str = ""
    """One of CONVERTED_INITS if A and B belong to a base model without the initial B A; empty: to the base model."""
    base_class: str = ""
    """transformers' class of the causal language model that it was trained on; empty if the config does not say."""

    @classmethod
    def parse(cls, text: bytes) -> PeftConfig:
        """Raises MultiloraError that names the field if the adapter could not be served exactly as PEFT would."""
        fields = fields_of(text)
        for refusal in refusals(fields, APPLIED):
            raise refusal
        return cls.of(fields)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> PeftConfig:
        """Of fields that are not among the `refusals`. Raises as `parse`."""
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
            init=converted_init(fields.get("init_lora_weights")),
            base_class=base_class(fields.get("auto_mapping")),
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


APPLIED = frozenset(PeftConfig.__dataclass_fields__) - {"init", "base_class"}
"""Fields of the file that act as they stand there."""


def _named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_match(patterns: tuple[tuple[re.Pattern[str], T], ...], module: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
