# SPDX-License-Identifier: Apache-2.0
"""What cannot be served exactly is refused, and the reason names the field, the tensor or the file."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch

from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.adapters.peft_config import APPLIED
from multilora_backend.adapters.peft_fields import BASE_CHANGING_INITS, BASE_KEEPING_INITS, HARMLESS, REFUSED
from multilora_backend.errors import MultiloraError
from refusals import refused

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


REFUSED_VALUES = {
    "use_dora": "yes",
    "lora_bias": 1,
    "bias": "some",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [-5],
    "layer_replication": [[0, 2], [1, 2]],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 64},
    "monteclora_config": {"num_samples": 4},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "init_lora_weights": "magic",
    "peft_type": "LOHA",
    "r": 0,
    "lora_alpha": "16",
    "use_rslora": "true",
    "target_modules": None,
    "exclude_modules": [3],
    "layers_to_transform": ["1"],
    "layers_pattern": "layers",
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "rank_pattern": {"q_proj": 0},
    "alpha_pattern": {"q_(proj": 3},
    "a_field_of_the_future": 0.0,
}


@pytest.mark.parametrize("field", REFUSED_VALUES)
def test_field_is_named(field, save, sites, change):
    refused(change(save(target_modules=["q_proj"]), **{field: REFUSED_VALUES[field]}), sites, f"^{field}\\b")


def test_every_refused_field_has_a_case():
    assert set(REFUSED) <= set(REFUSED_VALUES)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_fields_that_are_off_are_accepted(value, save, sites, change):
    off = dict.fromkeys(["use_dora", "modules_to_save", "a_field_of_the_future"], value)
    assert check_adapter(change(save(), **off), sites).rank == 4


def test_every_field_of_peft_is_known():
    known = {*APPLIED, *HARMLESS, *REFUSED, "peft_type", "bias", "init_lora_weights"}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq", "lora_ga"])
def test_inits_that_change_the_base_are_refused(init, save, sites, change):
    refused(change(save(), init_lora_weights=init), sites, "^init_lora_weights: .*base model")


@pytest.mark.parametrize("init", [*BASE_KEEPING_INITS, "pissa", "olora"])
def test_pefts_inits_change_the_base_or_not(init, llama):
    before = llama.model.layers[0].mlp.up_proj.weight.detach().clone()
    peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=init))
    kept = torch.equal(before, llama.model.layers[0].mlp.up_proj.base_layer.weight)
    assert kept == (init in BASE_KEEPING_INITS) == (init not in BASE_CHANGING_INITS)


@pytest.mark.parametrize("rank", [-1, 1.5, "8", True, 10**6])
def test_absurd_ranks(rank, save, sites, change):
    refused(change(save(), r=rank), sites, "^r: must be a whole number from 1 to 4096")
    refused(change(save(), rank_pattern={"q_proj": rank}), sites, r"^rank_pattern\['q_proj'\]: must be")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e10, None])
def test_absurd_alphas(alpha, save, sites, change):
    refused(change(save(), lora_alpha=alpha), sites, "^lora_alpha: must be a number")


def test_layers_need_a_list_of_names(save, sites, change):
    refused(change(save(), target_modules=".*_proj", layers_to_transform=[0]), sites, "^layers_to_transform: ")


def test_fully_trained_embeddings_in_the_file(save, sites, edit_tensors):
    name = "base_model.model.lm_head.weight"
    folder = edit_tensors(save(), lambda tensors: tensors.update({name: torch.ones(31, 32)}))
    refused(folder, sites, f"^{name}: ")


@pytest.mark.parametrize("suffix", ["lora_magnitude_vector", "lora_B.bias", "lora_embedding_A", "lora_A.other.weight"])
def test_tensors_of_other_methods(suffix, save, sites, edit_tensors):
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{suffix}"
    refused(edit_tensors(save(), lambda tensors: tensors.update({name: torch.ones(4)})), sites, f"^{name}: ")


def test_lm_head_is_no_site(save, sites):
    refused(save(target_modules=["q_proj", "lm_head"]), sites, r"lm_head\.(lora_A|base_layer)")


def test_tensor_of_a_module_that_is_not_targeted(save, sites, change):
    folder = change(save(target_modules=["q_proj", "k_proj"]), target_modules=["k_proj"])
    refused(folder, sites, r"^base_model\.model\.model\.layers\.\d\.self_attn\.q_proj\.lora_.*target_modules")


def test_targeted_module_without_tensors(save, sites, change):
    folder = change(save(target_modules=["q_proj"]), target_modules=["q_proj", "k_proj"])
    refused(folder, sites, r"^model\.layers\.0\.self_attn\.k_proj\.lora_A: is missing")


@pytest.mark.parametrize("part", "AB")
def test_missing_partner(part, save, sites, edit_tensors):
    folder = edit_tensors(save(), lambda tensors: tensors.pop(f"{Q}{part}.weight"))
    refused(folder, sites, f"q_proj.lora_{part}: is missing")


def test_the_same_tensor_twice(save, sites, edit_tensors):
    folder = edit_tensors(save(), lambda tensors: tensors.update({f"{Q}A.default.weight": torch.ones(4, 32)}))
    refused(folder, sites, "occurs twice")


def test_nothing_is_targeted(save, sites, change, edit_tensors):
    folder = edit_tensors(change(save(), target_modules=["c_attn"]), lambda tensors: tensors.clear())
    refused(folder, sites, "^target_modules: names no linear")


def test_rank_in_the_config_is_not_the_files(save, sites, change):
    refused(change(save(), r=5), sites, r"q_proj\.lora_A\.weight: has shape \[4, 32\], expected \[5, 32\]")


def test_other_base_with_another_width(save, sites):
    wider = [dataclasses.replace(site, in_features=64) for site in sites]
    refused(save(), wider, r"q_proj\.lora_A\.weight: has shape \[4, 32\], expected \[4, 64\]")


def test_other_base_with_fewer_or_more_layers(save, sites):
    folder = save(target_modules=["q_proj", "up_proj"])
    refused(folder, sites[:4], r"the base model has no model\.layers\.1\.")
    more = [dataclasses.replace(s, modules=tuple(m.replace("s.1.", "s.2.") for m in s.modules)) for s in sites[4:]]
    refused(folder, [*sites, *more], r"^model\.layers\.2\..*: is missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", "AB")
def test_not_finite(part, value, save, sites, edit_tensors):
    name = f"{Q}{part}.weight"
    folder = edit_tensors(save(), lambda tensors: tensors[name][-1, -1].fill_(value))
    refused(folder, sites, f"^{name}: holds NaN or infinity", weights=True)


def test_too_large_for_the_dtype(save, sites, edit_tensors):
    folder = edit_tensors(save(), lambda tensors: tensors[f"{Q}B.weight"].fill_(6e4))
    read_adapter(folder, sites, torch.bfloat16)
    with pytest.raises(MultiloraError, match=f"^{Q}B.weight: does not fit torch.float16 with the scale 1.5"):
        read_adapter(folder, sites, torch.float16)


def test_integer_weights(save, sites, edit_tensors):
    folder = edit_tensors(save(), lambda tensors: tensors.update({f"{Q}A.weight": torch.ones(4, 32, dtype=torch.int8)}))
    refused(folder, sites, f"^{Q}A.weight: dtype I8")
