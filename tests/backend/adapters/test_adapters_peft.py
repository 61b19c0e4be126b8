# SPDX-License-Identifier: Apache-2.0
"""Every supported form of a PEFT adapter gives PEFT's own change of the weights."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.ranks import padded
from multilora_backend.errors import MultiloraError

EPS = torch.finfo(torch.float32).eps

FORMS = {
    "list": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "full names": {"target_modules": ["model.layers.1.self_attn.k_proj", "layers.0.mlp.up_proj"]},
    "list with names of other models": {"target_modules": ["o_proj", "c_attn"]},
    "regex": {"target_modules": r".*layers\.[01]\.(self_attn\.[qk]|mlp\.up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "attention only": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 1, "lora_alpha": 1},
    "rslora": {"use_rslora": True, "r": 9, "lora_alpha": 5},
    "rank and alpha patterns": {
        "rank_pattern": {"q_proj": 2, "down_proj": 11, "layers.1.self_attn.k_proj": 3},
        "alpha_pattern": {"q_proj": 7, "gate_proj": 1, "layers.0.mlp.gate_proj": 31},
    },
    "regex patterns": {
        "rank_pattern": {r"layers\.1\..*": 5, r"^model\.layers\.0\.mlp\.(gate|up)_proj": 6, "proj": 2},
        "alpha_pattern": {r"model\..*\.o_proj": 20, r"[qkv]_proj": 3, r"self_attn.*": 100},
        "use_rslora": True,
    },
    "patterns whose sorted order decides": {"rank_pattern": {r".*_proj": 3, r"q_.*": 5}},
    "exclude list": {"exclude_modules": ["q_proj", "model.layers.0.mlp.down_proj"]},
    "exclude regex": {"exclude_modules": r".*layers\.0.*|.*up_proj"},
    "one layer": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": 1},
    "first layer": {"target_modules": ["v_proj"], "layers_to_transform": 0},
    "layers and pattern": {
        "target_modules": ["k_proj", "o_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
    },
    "float alpha": {"lora_alpha": 0.3},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "false": {"init_lora_weights": False, "inference_mode": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_delta_equals_pefts(form, save, sites, peft_deltas):
    folder = save(**FORMS[form])
    expected = peft_deltas(folder)
    weights = read_adapter(folder, sites, torch.float32)
    plan = check_adapter(folder, sites)
    touched = {part.module for part in plan.parts}
    assert touched == {name for name, delta in expected.items() if delta.any()}
    assert weights.rank == max(part.rank for part in plan.parts)
    assert not weights.no_effect
    for site, ours in zip(sites, weights.sites, strict=True):
        assert (ours is None) == touched.isdisjoint(site.modules)
        if ours is None:
            continue
        slices, size = len(site.modules), padded(weights.rank)
        assert ours.a.shape == (slices * size, site.in_features)
        assert ours.b.shape == (size, site.width)
        assert not ours.a.view(slices, size, -1)[:, weights.rank :].any()
        assert not ours.b[weights.rank :].any()
        for a, b, module in zip(
            ours.a.view(slices, size, -1), ours.b.split(site.out_features, dim=1), site.modules, strict=True
        ):
            delta = expected[module]
            # A rank-long sum in another order, plus the rounding of PEFT's W + delta that taking W away leaves.
            tolerance = EPS * (weights.rank * (b.abs().T @ a.abs()) + 2 * delta.abs() + 1)
            assert ((b.T @ a - delta).abs() <= tolerance).all(), module


def test_ranks_beyond_a_modules_own_and_slices_without_lora_are_zero(save, sites):
    folder = save(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 7})
    weights = read_adapter(folder, sites, torch.float32)
    q, k, v = weights.sites[0].a.view(3, 8, -1)
    assert weights.rank == 7
    assert not k.any()
    assert q[:4].all(dim=1).all()
    assert not q[4:].any()
    assert v[:7].all()
    assert not v[7:].any()
    assert not weights.sites[0].b[:, 32:48].any()
    assert not weights.sites[0].b[4:, :32].any()


def test_scale_is_folded_before_the_cast(save, sites):
    folder = save(r=3, lora_alpha=1)
    exact = read_adapter(folder, sites, torch.float32)
    half = read_adapter(folder, sites, torch.bfloat16)
    assert all(torch.equal(e.b.bfloat16(), h.b) for e, h in zip(exact.sites, half.sites, strict=True))
    assert half.nbytes * 2 == exact.nbytes
    elements = sum(8 * (len(site.modules) * site.in_features + site.width) for site in sites)
    assert exact.nbytes == 4 * elements


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_in_the_file(dtype, save, sites, edit_tensors):
    folder = save()

    def cast(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit_tensors(folder, cast)
    weights = read_adapter(folder, sites, torch.float32)
    stored = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    assert torch.equal(weights.sites[7].a[:4], stored[prefix + "A.weight"].float())
    assert torch.equal(weights.sites[7].b[:4], (stored[prefix + "B.weight"].float() * 1.5).T)


def test_unaligned_tensors_and_default_names(save, sites, edit_tensors):
    folder = save(target_modules=["o_proj"])
    before = read_adapter(folder, sites, torch.float32)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    path = edit_tensors(folder, rename) / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    after = read_adapter(folder, sites, torch.float32)
    assert after.version != before.version
    assert torch.equal(after.sites[5].a, before.sites[5].a)
    assert torch.equal(after.sites[5].b, before.sites[5].b)


def test_version_is_the_content(save, sites, change):
    one, two, other = save("one"), save("two"), save("other", seed=1)
    first = read_adapter(one, sites, torch.float32).version
    # PEFT writes sets, whose order differs, so the second config is made equal by hand.
    (two / "adapter_config.json").write_bytes((one / "adapter_config.json").read_bytes())
    assert read_adapter(two, sites, torch.float32).version == first
    assert read_adapter(other, sites, torch.float32).version != first
    assert read_adapter(change(two, lora_alpha=7), sites, torch.float32).version != first


@pytest.mark.parametrize("fields", [{"lora_alpha": 0}, {}])
def test_no_effect_is_reported(fields, save, sites, edit_tensors):
    folder = save(**fields)
    if not fields:
        edit_tensors(folder, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    assert read_adapter(folder, sites, torch.float32).no_effect


def test_check_agrees_with_read_and_reads_no_weights(save, sites):
    folder = save(rank_pattern={"q_proj": 13})
    plan = check_adapter(folder, sites)
    weights = read_adapter(folder, sites, torch.float32)
    assert plan.rank == weights.rank == 13
    assert plan.numel * 4 == weights.nbytes
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    assert check_adapter(folder, sites).rank == 13
    with pytest.raises(MultiloraError, match="NaN"):
        read_adapter(folder, sites, torch.float32)


MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.fq_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.blocks.0.layers.1.up_proj",
    "up_proj",
    "lm_head.x",
]
ENDINGS = ["q_proj", "up_proj", "proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
EXPRESSIONS = [
    r".*q_proj",
    r"model\.layers\.\d",
    r"q_proj|up_proj",
    r".*\.[01]\..*",
    r"^model\..*",
    r"layers.1.*",
    "up_proj",
    "",
]


def subsets(values):
    return st.lists(st.sampled_from(values), unique=True, max_size=3)


@given(
    targets=subsets(ENDINGS) | st.sampled_from(EXPRESSIONS),
    excluded=st.none() | subsets(ENDINGS) | st.sampled_from(EXPRESSIONS),
    layers=st.none() | st.integers(0, 11) | st.lists(st.sampled_from([0, 1, 11]), max_size=2),
    layer_names=st.none() | st.sampled_from(["layers", "blocks", "lay"]) | subsets(["layers", "blocks", "h"]),
)
@example(targets=["up_proj"], excluded=None, layers=1, layer_names="layers")
@example(targets=["up_proj"], excluded=None, layers=[0], layer_names=None)
def test_targets_are_pefts(targets, excluded, layers, layer_names):
    if isinstance(targets, str) or layers == []:
        layers = None
    if layers is None:
        layer_names = None
    fields = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": layer_names,
    }
    ours = PeftConfig.parse(json.dumps({"peft_type": "LORA", **fields}).encode())
    theirs = peft.LoraConfig(**fields)
    for module in MODULES:
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), module


@given(st.dictionaries(st.sampled_from(ENDINGS + EXPRESSIONS), st.integers(1, 9), max_size=4), st.booleans())
def test_patterns_are_pefts(pattern, rslora):
    fields = {"target_modules": [], "rank_pattern": pattern, "alpha_pattern": pattern, "r": 10, "lora_alpha": 20}
    config = PeftConfig.parse(json.dumps({"peft_type": "LORA", "use_rslora": rslora, **fields}).encode())
    for module in MODULES:
        key = get_pattern_key(pattern.keys(), module)
        rank, alpha = pattern.get(key, 10), pattern.get(key, 20)
        assert (config.rank(module), config.alpha(module)) == (rank, alpha)
        assert config.scale(module) == (alpha / rank**0.5 if rslora else alpha / rank)


def test_defaults_are_pefts():
    config = PeftConfig.parse(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}).encode())
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 8, False)


def test_all_linear_left_in_a_config_means_every_linear(save, sites, change):
    folder = change(save(target_modules="all-linear"), target_modules="All-Linear")
    assert len(check_adapter(folder, sites).parts) == 14
