# SPDX-License-Identifier: Apache-2.0
"""Which weights of the base model an adapter's config names, and how PEFT spells their tensors' names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

_ONE_EXPERT = re.compile(r".*\.experts\.\d+\..*")


@dataclass(frozen=True)
class Target:
    site: int
    slice: int
    key: str
    """What PEFT looks up in its patterns: the module's name, or the parameter's."""


def targets(config: PeftConfig, sites: Sequence[LoraSite]) -> dict[str, Target]:
    """What LoRA acts on by the module in its tensors' names, in the order of the sites.

    Raises MultiloraError if target_parameters names what is not there.
    """
    for target in config.target_parameters:
        if not any(_ends(site.parameter, target) for site in sites):
            why = "names no parameter of the base model that LoRA can act on (on experts with lora_experts only)"
            raise invalid("target_parameters", f"{target!r} {why}")
    found: dict[str, Target] = {}
    wrappers: Counter[str] = Counter()
    for index, site in reversed(list(enumerate(sites))):
        if site.parameter:
            (module,) = site.modules
            # A router was a linear in transformers 4: PEFT takes its name in target_modules for its parameter's.
            router = site.parameter == f"{module}.weight" and isinstance(config.target_modules, tuple)
            if _named(config, site.parameter) or (router and config.targets(module)):
                # PEFT wraps a module once more for each parameter in the order of the model: the last is outermost.
                found[module + ".base_layer" * wrappers[module]] = Target(index, 0, site.parameter)
                wrappers[module] += 1
            continue
        for j, module in reversed(list(enumerate(site.modules))):
            if config.targets(module):
                found[module] = Target(index, j, module)
    return dict(reversed(found.items()))


def refusal(tensor: str, module: str, sites: Sequence[LoraSite]) -> MultiloraError:
    """Why a tensor of that module, which is no target, is refused."""
    if _ONE_EXPERT.fullmatch(module):
        return MultiloraError(
            ErrorCode.UNSUPPORTED,
            f"{tensor}: is of one expert's own linear, which transformers 5 does not have any more; let PEFT load the "
            "adapter with transformers 5, which converts it, and save it again",
        )
    plain = module.replace(".base_layer", "")
    fields = {"target_parameters" if s.parameter else "target_modules" for s in sites if plain in s.modules}
    if not fields:
        return invalid(tensor, f"the base model has no linear {module} that LoRA can act on")
    return invalid(tensor, f"{fields.pop()} of adapter_config.json does not name {module}")


def _named(config: PeftConfig, parameter: str) -> bool:
    return any(_ends(parameter, target) for target in config.target_parameters)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
