# SPDX-License-Identifier: Apache-2.0
"""LoRA on the parameters of a mixture of experts (PEFT's target_parameters): laid out right, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_adapters import EXPERTS, HIDDEN, LAYERS, MIDDLE, check_deltas, deltas_of, model, refused, sites_of
from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import padded
from multilora_backend.core import LoraSite

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def sites() -> list[LoraSite]:
    return sites_of()


@pytest.fixture
def save(tmp_path: Path):
    """Saves a random adapter; returns the folder and PEFT's changes of the weights by parameter."""

    def save(**lora: Any) -> tuple[Path, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model(), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **lora}))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_()
        adapted.save_pretrained(tmp_path)
        return tmp_path, deltas_of(adapted)

    return save


FORMS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": [], "target_parameters": BOTH},
    "down alone": {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]},
    "gate and up alone": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "r": 8},
    "one layer by its full name": {
        "target_modules": ["o_proj"],
        "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate.weight"],
    },
    "what excludes linears does not exclude them": {
        "target_modules": ["q_proj", "k_proj"],
        "target_parameters": [*BOTH, "gate.weight"],
        "exclude_modules": [".*experts.*", "k_proj"],
        "layers_to_transform": [1],
    },
    "patterns": {
        "target_modules": [],
        "target_parameters": [*BOTH, "gate.weight"],
        "rank_pattern": {r"layers\.1\..*down_proj": 9, "gate_up_proj": 2, "gate.weight": 1},
        "alpha_pattern": {"experts.down_proj": 11, "mlp.gate.weight": 3},
        "use_rslora": True,
    },
    "all-linear": {"target_modules": "all-linear"},
    "as transformers 4 named them": {"target_modules": ["w1", "w2", "w3", "gate", "v_proj"]},
    "the router as a module": {"target_modules": ["v_proj", "gate"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_deltas_equal_pefts(form: str, save, sites: list[LoraSite]):
    check_deltas(*save(**FORMS[form]), sites)


def test_a_router_of_transformers_4_is_named_as_a_module(save, sites: list[LoraSite]):
    """PEFT writes the parameter's name by now, and reads both."""
    folder, _ = save(**FORMS["the router as a module"])
    expected = read_adapter(folder, sites, torch.float32)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert "gate.weight" in fields["target_parameters"]
    path.write_text(json.dumps({**fields, "target_modules": ["v_proj", "gate"], "target_parameters": None}))
    index = next(i for i, site in enumerate(sites) if site.key.endswith("mlp.gate"))
    ours, theirs = read_adapter(folder, sites, torch.float32).sites[index], expected.sites[index]
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours.b, theirs.b)


def test_the_pool_knows_who_acts_on_experts(save, sites: list[LoraSite]):
    pool = DevicePool(sites, 2**26, torch.float32, "cpu", max_ranks=32)
    weights = read_adapter(save(**FORMS["down alone"])[0], sites, torch.float32)
    pool.write(weights, slot=1, rank_start=8)
    pool.move(slot=1, rank_start=0)
    index = next(i for i, site in enumerate(sites) if site.key.endswith("experts.down_proj"))
    ours = weights.sites[index]
    assert ours is not None
    assert torch.equal(pool.a[index][: 8 * EXPERTS], ours.a)
    assert torch.equal(pool.b[index][: 8 * EXPERTS], ours.b)
    assert pool.on_experts.tolist() == [False, True, False, False]
    pool.write(read_adapter(save(target_modules=["q_proj"])[0], sites, torch.float32), slot=1, rank_start=0)
    assert not pool.on_experts.any()
    assert not pool.a[index][: 8 * EXPERTS].any(), "what was there is gone"


def test_the_plan_counts_all_experts(save, sites: list[LoraSite]):
    plan = check_adapter(save(**FORMS["both"])[0], sites)
    per_rank = HIDDEN + 2 * MIDDLE + MIDDLE + HIDDEN
    assert plan.numel == LAYERS * EXPERTS * padded(3) * per_rank


@pytest.mark.parametrize("field", ["lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora"])
def test_fields_that_peft_does_not_have_for_parameters(field: str, save, sites: list[LoraSite]):
    folder, _ = save(**FORMS["both"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 0.1 if field == "lora_dropout" else True}))
    refused(folder, sites, f"^{field}\\b")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"alora_invocation_tokens": [5]}, "^alora_invocation_tokens: PEFT has no alora_invocation_tokens with"),
        ({"init_lora_weights": "mica"}, "^target_parameters: PEFT does not combine it with init_lora_weights 'mica'"),
    ],
)
def test_variants_that_peft_does_not_have_for_parameters(
    fields: dict[str, Any], match: str, save, sites: list[LoraSite]
):
    folder, _ = save(**FORMS["both"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    refused(folder, sites, match)
    with pytest.raises(ValueError, match="variant combination"):
        peft.PeftModel.from_pretrained(model(), str(folder))


PREFIX = "base_model.model.model.layers.0.mlp."


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({f"{PREFIX}experts.0.w1.lora_A.weight": (3, HIDDEN)}, "experts.0.w1.lora_A.*target_modules .* does not name"),
        ({f"{PREFIX}gate.lora_A.weight": (3, HIDDEN)}, "gate.lora_A.*target_parameters .* does not name"),
        ({f"{PREFIX}experts.base_layer.base_layer.lora_A.weight": (3, HIDDEN)}, "experts.base_layer.base_layer"),
        ({f"{PREFIX}experts.lora_A.weight": None}, "mlp.experts.lora_A: is missing .* target_parameters"),
        ({f"{PREFIX}experts.lora_B.weight": (HIDDEN, 3)}, r"experts.lora_B.weight: has shape \[24, 3\].*\[24, 15\]"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Any], match: str, save, sites: list[LoraSite]):
    folder, _ = save(**FORMS["both"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.ones(shape)
    save_file(tensors, path)
    refused(folder, sites, match)


def test_what_the_model_does_not_have(save):
    folder, _ = save(**FORMS["both"])
    refused(folder, sites_of(experts=False), "^target_parameters: 'experts.*lora_experts")


@pytest.mark.parametrize("name", ["gate", "experts"])
def test_full_weights_of_routers_and_experts(name: str, save, sites: list[LoraSite]):
    folder, _ = save(**FORMS["down alone"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": [name]}))
    refused(folder, sites, f"^modules_to_save: full weights of .*mlp.{name}")
