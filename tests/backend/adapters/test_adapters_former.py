# SPDX-License-Identifier: Apache-2.0
"""Adapters of mixtures of experts that were saved with transformers 4: as PEFT converts them, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_adapters import Sizes, check_deltas, deltas_of, model, refused, save_former, sites_of
from multilora_backend.adapters.peft import read_adapter


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("mixtral", ["w1", "w2", "w3", "gate"]),
        ("mixtral", ["w2"]),
        ("mixtral", ["gate"]),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]),
        ("qwen3_moe", ["gate", "down_proj"]),
    ],
    ids=str,
)
def test_adapters_of_transformers_4_are_what_peft_makes_of_them(
    tmp_path: Path, family: str, targets: list[str], rank: int
):
    folder = save_former(tmp_path, targets, rank, Sizes(family))
    expected = deltas_of(peft.PeftModel.from_pretrained(model(family), str(folder)))
    check_deltas(folder, expected, sites_of(family))


def test_dropout_of_transformers_4_is_harmless(tmp_path: Path):
    """PEFT does not load it with parameters, but training is over and the linears of that time had it."""
    expected = read_adapter(save_former(tmp_path, ["w2"]), sites_of(), torch.float32)
    got = read_adapter(save_former(tmp_path, ["w2"], lora_dropout=0.05), sites_of(), torch.float32)
    for ours, theirs in zip(got.sites, expected.sites, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or torch.equal(ours.b, theirs.b)


def test_adapters_of_transformers_4_that_are_refused(tmp_path: Path):
    refused(save_former(tmp_path, ["w1", "w2", "w3"], use_rslora=True), sites_of(), "^use_rslora")
    for names in (["w1", "w3"], ["w1", "w2"]):  # PEFT drops the first and refuses the second
        refused(save_former(tmp_path, names), sites_of(), "^target_modules: .*PEFT converts")
    path = save_former(tmp_path, ["w1", "w2", "w3"]) / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.4.w3.lora_B.weight"]
    save_file(tensors, path)
    refused(tmp_path, sites_of(), "layers.1.mlp.experts.4.w3.lora_B: is missing .* target_modules")


@pytest.mark.parametrize(
    ("field", "value"), [("use_dora", True), ("lora_bias", True), ("alora_invocation_tokens", [5])]
)
def test_what_experts_cannot_have_is_not_dropped_in_silence(field: str, value: Any, tmp_path: Path):
    """Without magnitudes or biases in the file, the config alone tells."""
    folder = save_former(tmp_path, ["w1", "w2", "w3"], **{field: value})
    refused(folder, sites_of(), f"^{field}: PEFT has none on experts and routers")
