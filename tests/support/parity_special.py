# SPDX-License-Identifier: Apache-2.0
"""Cases of the parity suite: initialisations, experts, activated LoRA, sums and scales of requests."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

import parity_linears
import parity_vocabulary
from parity_case import Case
from parity_families import Family


def _init(value: Any, **more: Any) -> Any:
    return lambda f: {"init_lora_weights": value, "target_modules": [f.q, f.up], **more}


CONVERTED = "converted when it was saved, with path_initial_model_for_weight_conversion"
INITS = [
    Case("init_lora_weights", "false", _init(False)),
    Case("init_lora_weights", "gaussian", _init("gaussian")),
    Case("init_lora_weights", "orthogonal", _init("orthogonal")),
    Case("init_lora_weights", "mica", _init("mica")),
    Case(
        "init_lora_weights, eva_config",
        "eva",
        _init("eva", eva_config=EvaConfig(rho=2.0)),
        "with the ranks that EVA has given out, a pattern for each module",
        recipe="eva",
    ),
    Case("init_lora_weights", "pissa, converted", _init("pissa", r=4), CONVERTED, recipe="converted"),
    Case("init_lora_weights", "pissa_niter_4, converted", _init("pissa_niter_4", r=4), "likewise", recipe="converted"),
    Case("init_lora_weights", "olora, converted", _init("olora", r=3), "likewise", recipe="converted"),
    Case(
        "init_lora_weights",
        "pissa, as trained, with pissa_init",
        _init("pissa", r=4),
        "the adapter as it was before training lies in its folder as `pissa_init`; likewise olora_init, ...",
        recipe="beside",
    ),
    Case("init_lora_weights", "olora, as trained, with olora_init", _init("olora", r=3), recipe="beside"),
    Case(
        "init_lora_weights, corda_config",
        "corda, converted",
        _init("corda", r=4, corda_config=CordaConfig()),
        "likewise",
        recipe="converted",
    ),
    Case(
        "init_lora_weights, lora_ga_config",
        "lora_ga, converted",
        _init("lora_ga", r=4, lora_ga_config=LoraGAConfig()),
        "likewise",
        recipe="converted",
    ),
]

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _parameters(*names: str, modules: tuple[str, ...] = (), **more: Any) -> Any:
    return lambda _: {
        "target_modules": list(modules),
        "target_parameters": list(names),
        "r": 3,
        "lora_alpha": 5,
        **more,
    }


def _as_linears(f: Family) -> dict[str, Any]:
    """Experts as transformers 4 named them."""
    names = ["w1", "w2", "w3", "gate"] if f.model_type == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    return {"target_modules": names, "r": 3, "lora_alpha": 5}


def _down_as_linears(f: Family) -> dict[str, Any]:
    return {"target_modules": ["w2" if f.model_type == "mixtral" else "down_proj"], "r": 4, "lora_alpha": 5}


EXPERTS = [
    Case("target_parameters", "experts", _parameters(*BOTH), experts_only=True),
    Case(
        "target_parameters", "experts, one of the two", _parameters("down_proj", modules=("o_proj",)), experts_only=True
    ),
    Case("target_parameters", "router", _parameters("gate.weight"), experts_only=True),
    Case(
        "target_parameters",
        "experts of one layer, by full name",
        _parameters("model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate.weight", modules=("q_proj",)),
        experts_only=True,
    ),
    Case(
        "target_parameters",
        "experts, router and attention, with patterns and rsLoRA",
        _parameters(
            *BOTH,
            "gate.weight",
            modules=("q_proj", "o_proj"),
            rank_pattern={"q_proj": 2, "experts.gate_up_proj": 9, "layers.1.mlp.experts.down_proj": 5},
            alpha_pattern={"o_proj": 3, r".*\.0\..*down_proj": 20, "gate.weight": 2},
            use_rslora=True,
        ),
        experts_only=True,
    ),
    Case(
        "target_modules",
        "experts' linears, saved with transformers 4",
        _as_linears,
        "one linear an expert in the file",
        experts_only=True,
        recipe="former",
    ),
    Case(
        "target_modules",
        "experts' down alone, saved with transformers 4",
        _down_as_linears,
        experts_only=True,
        recipe="former",
    ),
]

INVOKE = (50, 51)
ACTIVATED = [
    Case(
        "alora_invocation_tokens",
        "in prompts once, several times and not at all",
        lambda _: {"alora_invocation_tokens": list(INVOKE), "task_type": "CAUSAL_LM"},
        "the adapter acts from their last occurrence in the prompt on",
        inserts=(INVOKE, (*INVOKE, 7, *INVOKE, 50), (50, 3, 51)),
    ),
]

ONE, PATTERNS, SOME = (
    next(case.name for case in parity_linears.CASES if (case.fields, case.form) == wanted)
    for wanted in (
        ("r, lora_alpha", "one for all linears"),
        ("use_rslora", "with patterns"),
        ("target_modules", "list of names"),
    )
)
DORA = next(case.name for case in parity_linears.CASES if case.fields == "use_dora")
# PEFT scales a sum once more if its first part has rsLoRA: PATTERNS never comes first.
SUMS = [
    Case("sum of adapters", "a:0.7,b:0.3", note="PEFT's add_weighted_adapter with combination_type='cat'",
         parts=((ONE, 0.7), (PATTERNS, 0.3))),
    Case("sum of adapters", "three, one of them negative", parts=((SOME, 0.25), (ONE, -1.5), (PATTERNS, 0.5))),
    Case("scale of a request", "a:0.5", note="a sum of one part", parts=((ONE, 0.5),)),
]  # fmt: skip

APPLIED = [*parity_linears.CASES, *parity_vocabulary.CASES, *INITS, *EXPERTS, *ACTIVATED, *SUMS]
