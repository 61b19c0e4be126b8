# SPDX-License-Identifier: Apache-2.0
"""Cases of the parity suite: which linears have LoRA, of which rank and scale, and what they have besides."""

from __future__ import annotations

from typing import Any

from parity_case import Case
from parity_families import Family


def _notes(_: Family) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", "revision": "main", "lora_dropout": 0.1}


CASES = [
    Case("r, lora_alpha", "one for all linears", lambda f: {"r": 5, "lora_alpha": 7.5}),
    Case(
        "rank_pattern",
        "names, endings, full names",
        lambda f: {"rank_pattern": {f.q: 2, f.down: 11, f"layers.1.{f.paths[1]}": 3, f.path(f.up, 0): 9}},
        "a rank of its own for each linear",
    ),
    Case(
        "rank_pattern",
        "regular expressions",
        lambda f: {"rank_pattern": {r".*layers\.1\..*": 5, rf"^model\..*\.({f.q}|{f.o})": 6, r"model\..*": 2}},
        "the first one that matches counts; PEFT sorts them when it saves",
    ),
    Case(
        "alpha_pattern",
        "names, endings, full names",
        lambda f: {"alpha_pattern": {f.q: 3, f.down: 30, f"layers.0.{f.paths[1]}": 25, f.path(f.up, 1): 1}},
    ),
    Case(
        "alpha_pattern",
        "regular expressions",
        lambda f: {
            "alpha_pattern": {r".*layers\.1\..*": 3, rf"^model\..*\.{f.o}": 40, r"model\..*": 20},
            "rank_pattern": {f.o: 3},
        },
    ),
    Case("use_rslora", "one rank", lambda f: {"use_rslora": True, "r": 9, "lora_alpha": 5}),
    Case(
        "use_rslora",
        "with patterns",
        lambda f: {"use_rslora": True, "rank_pattern": {f.q: 3, f.down: 17}, "alpha_pattern": {f.o: 9}},
    ),
    Case("target_modules", "list of names", lambda f: {"target_modules": [f.q, f.down]}),
    Case("target_modules", "endings", lambda f: {"target_modules": [f.paths[1], f"layers.1.{f.paths[2]}"]}),
    Case("target_modules", "full names", lambda f: {"target_modules": [f.path(f.q, 0), f.path(f.down, 1)]}),
    Case(
        "target_modules",
        "regular expression",
        lambda f: {"target_modules": rf"model\.layers\.[01]\..*\.({f.q}|{f.up})|.*\.1\..*\.{f.o}"},
    ),
    Case("target_modules", "all-linear", lambda f: {"target_modules": "all-linear", "r": 4}),
    Case(
        "target_modules",
        "also names that the model lacks",
        lambda f: {"target_modules": [f.o, "c_attn"]},
        "ignored, as PEFT does",
    ),
    Case("exclude_modules", "list", lambda f: {"exclude_modules": [f.q, f.path(f.down, 0)]}),
    Case("exclude_modules", "regular expression", lambda f: {"exclude_modules": rf".*layers\.0.*|.*{f.up}"}),
    Case("layers_to_transform", "a number", lambda f: {"target_modules": [f.q, f.up], "layers_to_transform": 1}),
    Case("layers_to_transform", "a list", lambda f: {"target_modules": [f.o, f.down], "layers_to_transform": [0]}),
    Case(
        "layers_pattern",
        "a list",
        lambda f: {
            "target_modules": [f.q, f.o],
            "layers_to_transform": [1],
            "layers_pattern": ["blocks", "layers"],
        },
    ),
    Case(
        "layers_pattern",
        "a name",
        lambda f: {"target_modules": [f.up], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    Case(
        "fan_in_fan_out",
        "true",
        lambda f: {"fan_in_fan_out": True},
        "without effect on these models, as in PEFT, which does not even write it",
        recipe="edited",
    ),
    Case("lora_bias", "true", lambda f: {"lora_bias": True, "r": 6}),
    Case(
        "lora_bias",
        "with patterns and rsLoRA",
        lambda f: {"lora_bias": True, "alpha_pattern": {f.q: 3}, "rank_pattern": {f.o: 2}, "use_rslora": True},
    ),
    Case(
        "bias",
        "all",
        lambda f: {"bias": "all", "target_modules": [f.o]},
        "Mistral, Phi-3 and Mixtral have no biases: there is nothing to apply",
    ),
    Case("bias", "lora_only", lambda f: {"bias": "lora_only", "target_modules": [f.q, f.down]}, "likewise"),
    Case("bias", "all, with lora_bias", lambda f: {"bias": "all", "lora_bias": True, "target_modules": [f.q, f.up]}),
    Case("use_dora", "all linears", lambda f: {"use_dora": True, "r": 6}),
    Case(
        "use_dora",
        "with patterns and rsLoRA",
        lambda f: {
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {f.q: 3, f.down: 11},
            "alpha_pattern": {f.o: 40},
        },
    ),
    Case("use_dora", "with bias all", lambda f: {"use_dora": True, "bias": "all", "target_modules": [f.o, f.up]}),
    Case(
        "task_type, peft_version, base_model_name_or_path, revision, inference_mode, lora_dropout",
        "set",
        _notes,
        "about training, or notes: without effect on answers",
    ),
    Case(
        "runtime_config, megatron_core, qalora_group_size, peft_type, auto_mapping",
        "as PEFT writes them",
        lambda f: {"megatron_core": "another.core", "qalora_group_size": 4},
        "without effect as long as what they belong to is off",
    ),
]
