# SPDX-License-Identifier: Apache-2.0
"""An adapter that PEFT has not converted, with the initial one in its folder, is what PEFT would have converted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from extras_models import TOKENS, check, driver_of, prompts
from gpu_driver import free_drivers
from gpu_models import Judge, save_model
from initial_adapters import INITS, train
from multilora_backend.adapters.initial import initial_folder
from multilora_backend.adapters.opened import open_weights
from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.tensors import parse_header, tensor_of
from multilora_backend.errors import MultiloraError


def paired(folder: Path) -> Path:
    """`raw` with the initial adapter where it is looked for."""
    config = PeftConfig.parse((folder / "raw/adapter_config.json").read_bytes())
    shutil.copytree(folder / "initial", folder / "raw" / initial_folder(config))
    return folder / "raw"


def refused(folder: Path, sites, match: str) -> None:
    for read in (lambda: check_adapter(folder, sites), lambda: read_adapter(folder, sites, torch.float32)):
        with pytest.raises(MultiloraError, match=match):
            read()


@pytest.mark.parametrize("name", INITS)
def test_the_tensors_are_those_that_peft_writes(name, sites, llama, tmp_path: Path):
    train(name, llama, tmp_path)
    folder = paired(tmp_path)
    with open_weights(folder, PeftConfig.parse((folder / "adapter_config.json").read_bytes()), ()) as opened:
        data, _ = opened.read()
        ours = {key: tensor_of(info, data).clone() for key, info in parse_header(opened.header, "joined").items()}
    peft_own = load_file(tmp_path / "done/adapter_model.safetensors")
    assert ours.keys() == peft_own.keys()
    assert all(ours[key].equal(peft_own[key]) for key in ours)
    converted = PeftConfig.parse((tmp_path / "done/adapter_config.json").read_bytes())
    for site in sites:
        for module in site.modules:
            assert opened.config.rank(module) == converted.rank(module)
            assert opened.config.scale(module) == pytest.approx(converted.scale(module), rel=1e-15)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"lora_alpha": 3, "alpha_pattern": {"o_proj": 7}}])
def test_what_is_laid_out_is_that_of_the_converted_adapter(more, sites, llama, tmp_path: Path):
    train("pissa", llama, tmp_path, **more)
    ours, done = (
        read_adapter(paired(tmp_path), sites, torch.float32),
        read_adapter(tmp_path / "done", sites, torch.float32),
    )
    assert ours.rank == done.rank == 8
    assert check_adapter(tmp_path / "raw", sites).rank == 8
    for own, theirs in zip(ours.sites, done.sites, strict=True):
        assert (own is None) == (theirs is None)
        if own is not None and theirs is not None:
            assert own.a.equal(theirs.a)
            torch.testing.assert_close(own.b, theirs.b, rtol=4e-7, atol=0)  # sqrt(2) alpha is rounded in the file


def test_the_version_is_of_both_files(sites, llama, tmp_path: Path):
    train("olora", llama, tmp_path, convert=False)
    folder = paired(tmp_path)
    before = read_adapter(folder, sites, torch.float32).version
    path = folder / "olora_init/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_adapter(folder, sites, torch.float32).version != before


def test_what_does_not_belong_to_it_is_refused(sites, llama, tmp_path: Path, edit_tensors):
    train("pissa", llama, tmp_path, convert=False)
    folder = paired(tmp_path)
    initial = folder / "pissa_init"
    weights = (initial / "adapter_model.safetensors").read_bytes()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    edit_tensors(initial, lambda tensors: tensors.pop(name))
    refused(folder, sites, rf"^pissa_init/adapter_model\.safetensors: {name}: is missing")
    (initial / "adapter_model.safetensors").write_bytes(weights)
    edit_tensors(initial, lambda tensors: tensors.update({name + "x": tensors[name].clone()}))
    refused(folder, sites, f"{name}x: the trained adapter has none")
    (initial / "adapter_model.safetensors").write_bytes(weights)
    edit_tensors(initial, lambda tensors: tensors.update({name: tensors[name][:3]}))
    refused(folder, sites, rf"{name}: has shape \(3, 32\), the trained adapter \(4, 32\)")
    (initial / "adapter_model.safetensors").write_bytes(weights)
    edit_tensors(initial, lambda tensors: tensors.update({name: tensors[name].half()}))
    refused(folder, sites, f"{name}: has dtype F16, the trained adapter F32")
    (initial / "adapter_model.safetensors").unlink()
    refused(folder, sites, r"^pissa_init/adapter_model\.safetensors: is missing")


def test_a_link_out_of_the_folder_is_refused(sites, llama, tmp_path: Path):
    train("pissa", llama, tmp_path, convert=False)
    (tmp_path / "raw/pissa_init").symlink_to(tmp_path / "initial")
    refused(tmp_path / "raw", sites, "is a symbolic link that leaves")
    inside = (tmp_path / "initial",)
    assert read_adapter(tmp_path / "raw", sites, torch.float32, inside=inside).rank == 8


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"use_rslora": True, "rank_pattern": {"o_proj": 2}}, "^use_rslora: PEFT does not convert pissa together"),
        ({"use_rslora": True, "alpha_pattern": {"o_proj": 2}}, "^use_rslora: PEFT does not convert pissa together"),
        ({"use_dora": True}, "lora_magnitude_vector: PEFT does not convert pissa with other tensors"),
        ({"modules_to_save": ["norm"]}, "norm.weight: PEFT does not convert pissa with other tensors"),
    ],
)
def test_what_peft_does_not_convert_is_refused(more, reason, sites, llama, tmp_path: Path):
    train("pissa", llama, tmp_path, convert=False, **more)
    refused(paired(tmp_path), sites, reason)


def test_nothing_converts_loftq(save, sites, change, tmp_path: Path):
    folder = change(save(), init_lora_weights="loftq")
    shutil.copytree(folder, folder / "loftq_init")
    refused(folder, sites, "^init_lora_weights: 'loftq' changes the base model's weights, and nothing converts it")


def test_the_engine_answers_as_peft_does_with_the_converted_one(tmp_path: Path):
    save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    train("pissa", model, tmp_path, r=5, target_modules="all-linear")
    (tmp_path / "adapters").mkdir()
    paired(tmp_path).rename(tmp_path / "adapters/tuned")
    (tmp_path / "truth").mkdir()
    (tmp_path / "done").rename(tmp_path / "truth/tuned")
    driver = driver_of(tmp_path, "grouped")
    numbers = [driver.submit(prompt, "tuned", max_tokens=TOKENS) for prompt in prompts(3)]
    driver.run()
    check([driver.requests[number] for number in numbers], Judge(tmp_path / "model", tmp_path / "truth", "cpu"))
    free_drivers()
