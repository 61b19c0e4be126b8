# SPDX-License-Identifier: Apache-2.0
"""DoRA, biases of lora_B and trained biases: what they make of a linear is what PEFT's own modules make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from extras_models import make_base, save_trained
from multilora_backend.adapters.affine import AffinePart, fill_affine
from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.extras import AFFINE, affine_spec, allocate_extras
from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.tensors import TensorInfo
from multilora_backend.core import LoraSite
from multilora_backend.errors import MultiloraError
from multilora_backend.models.fusion import fuse, linears

EPS = torch.finfo(torch.float32).eps
FORMS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora at other ranks": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3, "down_proj": 11},
        "alpha_pattern": {"o_proj": 40},
    },
    "dora, all biases": {"use_dora": True, "bias": "all", "target_modules": ["k_proj", "down_proj"]},
    "lora_bias": {"lora_bias": True, "alpha_pattern": {"k_proj": 3}},
    "bias lora_only": {"bias": "lora_only", "target_modules": ["v_proj", "o_proj"]},
    "everything but dora": {"bias": "all", "lora_bias": True, "target_modules": ["v_proj", "gate_proj", "o_proj"]},
    "fan_in_fan_out": {"use_dora": True, "fan_in_fan_out": True, "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="module", params=[True, False], ids=["biased", "unbiased"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    make_base(request.param).save_pretrained(path)
    return path


@pytest.fixture
def running(folder: Path) -> tuple[list[LoraSite], BaseModel]:
    model = LlamaForCausalLM.from_pretrained(folder)
    return fuse(model), BaseModel(dict(enumerate(linears(model))))


@pytest.mark.parametrize("form", FORMS)
def test_every_linear_gives_what_pefts_gives(form, folder, running, tmp_path):
    sites, base = running
    save_trained(folder, tmp_path, **FORMS[form])
    plan = check_adapter(tmp_path, sites, base=base)
    weights = read_adapter(tmp_path, sites, torch.float32, base=base)
    assert weights.extras_bytes == plan.extras_bytes
    assert weights.nbytes == 4 * plan.numel + plan.extras_bytes
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), str(tmp_path)).eval()
    modules = dict(theirs.base_model.model.named_modules())
    generator = torch.Generator().manual_seed(5)
    for index, site in enumerate(sites):
        x = torch.randn(3, site.in_features, generator=generator)
        linear, own = base.linears[index], weights.sites[index]
        y = x @ linear.base_weight.T + (0 if linear.base_bias is None else linear.base_bias)
        if own is not None:
            a = own.a.view(len(site.modules), padded(weights.rank), -1)
            h = torch.einsum("tk,srk->tsr", x, a).unbind(1)
            y = y + torch.cat([h_i @ b for h_i, b in zip(h, own.b.split(site.out_features, 1), strict=True)], 1)
        affine = None if weights.extras is None else weights.extras.tensors.get(affine_spec(site).key)
        if affine is not None:
            y = y * affine[0] + affine[1]
        with torch.inference_mode():
            expected = torch.cat([modules[name](x) for name in site.modules], dim=1)
        # fp32: sums of 40 terms in another order, and a division by a norm.
        assert (y - expected).abs().max() <= 64 * EPS * expected.abs().max(), site.key


def test_only_what_an_adapter_has_takes_memory(folder, running, tmp_path):
    sites, base = running
    save_trained(folder, tmp_path, use_dora=True, target_modules=["o_proj"])
    weights = read_adapter(tmp_path, sites, torch.bfloat16, base=base)
    assert weights.extras is not None
    assert list(weights.extras.tensors) == [(AFFINE, s.key) for s in sites if "o_proj" in s.key]
    assert weights.extras_bytes == 2 * (2 * 32 * 4), "float32 whatever the model's dtype is"
    save_trained(folder, tmp_path / "plain")
    assert read_adapter(tmp_path / "plain", sites, torch.float32, base=base).extras is None


def test_an_adapter_with_extras_has_an_effect_even_without_b(folder, running, tmp_path, edit_tensors):
    sites, base = running
    if base.linears[0].base_bias is None:
        pytest.skip("has no bias to train")
    save_trained(folder, tmp_path, bias="lora_only", target_modules=["q_proj"])
    edit_tensors(tmp_path, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    assert not read_adapter(tmp_path, sites, torch.float32, base=base).no_effect

    def untrained(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.base_layer.bias"
            tensors[name] = base.linears[4 * layer].base_bias[:32].clone()

    edit_tensors(tmp_path, untrained)
    assert read_adapter(tmp_path, sites, torch.float32, base=base).no_effect


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "no magnitude": (
        {"use_dora": True},
        lambda t: t.pop(f"{Q}.lora_magnitude_vector"),
        r"^model\.layers\.0\.self_attn\.q_proj\.lora_magnitude_vector: is missing .* use_dora",
    ),
    "magnitude of another width": (
        {"use_dora": True},
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(31)}),
        r"lora_magnitude_vector: has shape \[31\], expected \[32\]",
    ),
    "magnitude without DoRA": (
        {},
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}),
        r"q_proj\.lora_magnitude_vector: use_dora in adapter_config.json does not ask for it",
    ),
    "magnitude of NaN": (
        {"use_dora": True},
        lambda t: t[f"{Q}.lora_magnitude_vector"].fill_(torch.nan),
        r"lora_magnitude_vector: holds NaN",
    ),
    "no bias of B": (
        {"lora_bias": True},
        lambda t: t.pop(f"{Q}.lora_B.bias"),
        r"lora_B\.bias: is missing .* lora_bias",
    ),
    "bias of B without lora_bias": (
        {},
        lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)}),
        r"lora_B\.bias: lora_bias in adapter_config.json does not ask for it",
    ),
    "bias of B too large": (
        {"lora_bias": True},
        lambda t: t.update({f"{Q}.lora_B.bias": torch.full((32,), 1e300, dtype=torch.float64)}),
        r"lora_B\.bias: holds NaN or infinity",
    ),
    "bias that nobody announced": (
        {},
        lambda t: t.update({f"{Q}.base_layer.bias": torch.ones(32)}),
        r"base_layer\.bias: bias in adapter_config.json does not ask for it",
    ),
    "bias of a linear without LoRA, lora_only": (
        {"bias": "lora_only"},
        lambda t: t.update({f"{Q.replace('q_', 'o_')}.bias": torch.ones(32)}),
        r"o_proj\.bias: bias in adapter_config.json does not ask for it",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_by_name(case, folder, running, tmp_path, edit_tensors):
    sites, base = running
    fields, edit, match = BROKEN[case]
    save_trained(folder, tmp_path, target_modules=["q_proj"], **fields)
    edit_tensors(tmp_path, edit)
    with pytest.raises(MultiloraError, match=match):
        read_adapter(tmp_path, sites, torch.float32, base=base)


def test_biases_in_the_wrong_place_or_for_another_base(folder, running, tmp_path, edit_tensors):
    sites, base = running
    save_trained(folder, tmp_path, bias="all", target_modules=["q_proj"])
    biased = base.linears[0].base_bias is not None

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors.pop(f"{Q}.base_layer.bias", None)
        tensors[f"{Q}.bias"] = torch.ones(32)

    if biased:
        edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{Q}.base_layer.bias"))
        with pytest.raises(MultiloraError, match=r"q_proj\.bias: is missing .* bias in adapter_config"):
            read_adapter(tmp_path, sites, torch.float32, base=base)
    edit_tensors(tmp_path, rename)
    with pytest.raises(MultiloraError, match=r"q_proj\.bias: PEFT would not find it: .* has LoRA"):
        read_adapter(tmp_path, sites, torch.float32, base=base)
    edit_tensors(tmp_path, lambda t: t.update({f"{Q}.base_layer.bias": t.pop(f"{Q}.bias")}))
    if biased:
        assert read_adapter(tmp_path, sites, torch.float32, base=base).extras is not None
    else:
        with pytest.raises(MultiloraError, match=r"the base model's model\.layers\.0\.self_attn\.q_proj has no bias"):
            read_adapter(tmp_path, sites, torch.float32, base=base)


def test_a_row_that_lora_cancels_cannot_be_scaled(running):
    sites, base = running
    site = sites[1]
    weight = base.linears[1].base_weight.clone()
    info = TensorInfo("m", "F32", (32,), 0, 0)
    contents = {"m": torch.ones(32), "a": torch.eye(32), "b": -weight}
    part = AffinePart("o", 1, 0, magnitude=info, a=TensorInfo("a", "F32", (), 0, 0), b=TensorInfo("b", "F32", (), 0, 0))
    extras = allocate_extras([affine_spec(site)])
    with pytest.raises(MultiloraError, match=r"^m: is divided by the norm of a row .* that is zero"):
        fill_affine(extras, [part], sites, base, lambda info: contents[info.name])


@pytest.mark.parametrize(("fields", "match"), [
    ({"use_dora": True, "lora_bias": True}, "^lora_bias: PEFT does not combine it with use_dora"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "^lora_bias: PEFT does not combine"),
    ({"use_dora": True, "init_lora_weights": "mica"}, "^use_dora: PEFT does not combine it with .*mica"),
    ({"alora_invocation_tokens": [5], "init_lora_weights": "mica"}, "^alora_invocation_tokens: PEFT does not combine"),
])  # fmt: skip
def test_combinations_that_peft_refuses(fields, match, folder, running, tmp_path, change):
    sites, base = running
    with pytest.raises(MultiloraError, match=match):
        check_adapter(change(save_trained(folder, tmp_path), **fields), sites, base=base)
    with pytest.raises((ValueError, TypeError)):
        peft.get_peft_model(make_base(True), peft.LoraConfig(target_modules=["q_proj"], **fields))


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_without_the_base_model_extras_are_refused(field, folder, running, tmp_path):
    save_trained(folder, tmp_path, **{field: True})
    with pytest.raises(MultiloraError, match=f"^{field}: needs the base model, which is not loaded"):
        check_adapter(tmp_path, running[0])


def test_norms_come_from_the_weights_and_not_from_the_border(running):
    linear = running[1].linears[0]
    before, bias = linear.base_weight.clone(), linear.base_bias
    linear.add_border(64)
    linear.weight.data[len(before) :] = torch.nan
    assert torch.equal(linear.base_weight, before)
    assert bias is None or torch.equal(linear.base_bias, bias)
