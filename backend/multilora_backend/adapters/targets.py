# SPDX-License-Identifier: Apache-2.0
"""Which weights of the base model an adapter's config names, and how PEFT spells their tensors' names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    expert: int | None = None
    """Of a linear that one expert had to itself in transformers 4; None: all that the slice is."""


def targets(config: PeftConfig, sites: Sequence[LoraSite], modules: Collection[str]) -> dict[str, Target]:
    """What LoRA acts on by the module in its tensors' names, in the order of the sites.

    `modules`: of all tensors in the file, which tell whether experts have linears, as in transformers 4, or parameters.

    Raises MultiloraError for what PEFT itself would convert wrong.
    """
    former = any(_ONE_EXPERT.fullmatch(module) for module in modules)
    found: dict[str, Target] = {}
    wrappers: Counter[str] = Counter()
    for index, site in reversed(list(enumerate(sites))):
        as_linears = former if site.experts else not site.parameter or site.modules[0] in modules
        if site.parameter and any(_ends(site.parameter, target) for target in config.target_parameters):
            # PEFT wraps a module once more for each parameter in the order of the model: the last is outermost.
            (module,) = site.modules
            found[module + ".base_layer" * wrappers[module]] = Target(index, 0, site.parameter)
            wrappers[module] += 1
        elif as_linears:
            found |= reversed([(name, own) for name, own in _linears(index, site) if config.targets(name)])
    if former:
        _check_former(config, found, sites)
    return dict(reversed(found.items()))


def check_parameters(config: PeftConfig, sites: Sequence[LoraSite]) -> None:
    """Raises MultiloraError if target_parameters names what is not there."""
    for target in config.target_parameters:
        if not any(_ends(site.parameter, target) for site in sites):
            why = "names no parameter of the base model that LoRA can act on (on experts with lora_experts only)"
            raise invalid("target_parameters", f"{target!r} {why}")


def _check_former(config: PeftConfig, found: Mapping[str, Target], sites: Sequence[LoraSite]) -> None:
    """Raises MultiloraError where PEFT converts what transformers 4 saved to something else than it was."""
    if config.use_rslora:
        raise MultiloraError(
            ErrorCode.UNSUPPORTED, "use_rslora: PEFT gives other scales to experts that transformers 4 had as linears"
        )
    parameters = [{name.rpartition(".")[2] for name in site.former} for site in sites if site.former]
    named = {name.rpartition(".")[2] for name, target in found.items() if target.expert is not None}
    # PEFT finds the first parameter's tensors only where the last one, which is wrapped around it, is there too.
    if named not in (set(), parameters[-1], set().union(*parameters)):
        raise MultiloraError(
            ErrorCode.UNSUPPORTED,
            f"target_modules: of an expert's linears in transformers 4 PEFT converts {sorted(parameters[-1])} or "
            f"{sorted(set().union(*parameters))}, not {sorted(named)}",
        )


def current_name(module: str) -> str:
    """The module in today's models: transformers has renamed Mixtral's, and PEFT follows it."""
    return module.replace(".block_sparse_moe.", ".mlp.")


def _linears(index: int, site: LoraSite) -> Iterator[tuple[str, Target]]:
    """What target_modules may name: linears, and what was one in transformers 4."""
    if not site.experts:
        for j, module in enumerate(site.modules):
            # PEFT takes a router's name there for its parameter's.
            yield module, Target(index, j, site.parameter or module)
    for j, name in enumerate(site.former):
        for expert in range(site.experts):
            module = name.format(expert)
            yield module, Target(index, j, module, expert)


def parameter_modules(sites: Sequence[LoraSite]) -> Iterator[str]:
    """Whatever the parameters of experts and routers may be called in tensors' names."""
    for index, site in enumerate(sites):
        if site.parameter:
            yield from site.modules
            yield from (name for name, _ in _linears(index, site))


def refusal(tensor: str, module: str, sites: Sequence[LoraSite]) -> MultiloraError:
    """Why a tensor of that module, which is no target, is refused."""
    plain = module.replace(".base_layer", "")
    for site in sites:
        if plain in site.modules:
            field = "target_parameters" if site.parameter else "target_modules"
            return invalid(tensor, f"{field} of adapter_config.json does not name {module}")
        if any(plain == name for name, _ in _linears(0, site)):
            return invalid(tensor, f"target_modules of adapter_config.json does not name {module}")
    return invalid(tensor, f"the base model has no linear {module} that LoRA can act on")


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
