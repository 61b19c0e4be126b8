# SPDX-License-Identifier: Apache-2.0
"""What a folder alone tells of an adapter, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from initial_adapters import train
from multilora_backend.adapters.inspection import inspect_folder

UP = "base_model.model.model.layers.0.mlp.up_proj.lora_"


def test_what_it_is_and_what_is_in_its_file(save):
    patterns = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 20}}
    folder = save(target_modules=["up_proj", "q_proj"], use_rslora=True, bias="none", **patterns)
    found = inspect_folder(folder)
    assert found.reasons == []
    assert found.peft_version
    assert found.base_class == "LlamaForCausalLM"
    assert (found.rank, found.alpha, sorted(found.target_modules)) == (4, 6, ["q_proj", "up_proj"])
    assert found.settings == {"use_rslora": True, **patterns}
    assert found.file_bytes == (folder / "adapter_model.safetensors").stat().st_size
    by_name = {module.module: module for module in found.modules}
    assert len(by_name) == 4
    up, q = by_name["model.layers.0.mlp.up_proj"], by_name["model.layers.1.self_attn.q_proj"]
    assert (up.rank, up.scale, up.shapes) == (3, 6 / 3**0.5, {"A": (3, 32), "B": (40, 3)})
    assert (q.rank, q.scale, q.file_bytes, q.dtypes) == (4, 20 / 4**0.5, 4 * 4 * (32 + 32), ("F32",))


@pytest.mark.parametrize("tensor", ["A", "B"])
def test_no_effect(tensor, save, edit_tensors):
    def zero(tensors):
        for name in tensors:
            if f"lora_{tensor}" in name:
                tensors[name].zero_()

    folder = save()
    assert inspect_folder(folder).no_effect is False
    assert inspect_folder(edit_tensors(folder, zero)).no_effect is True
    edit_tensors(folder, lambda tensors: tensors[f"{UP}{tensor}.weight"].fill_(1))
    assert inspect_folder(folder).no_effect is False


def test_whether_more_than_a_and_b_has_an_effect_is_not_known(save, edit_tensors):
    def zero(tensors):
        for name in tensors:
            if "lora_B" in name:
                tensors[name].zero_()

    assert inspect_folder(edit_tensors(save(use_dora=True), zero)).no_effect is None
    assert inspect_folder(save(use_dora=True)).no_effect is False


def test_every_reason_of_the_config_is_told(save, change):
    wrong = {"use_qalora": True, "arrow_config": {"top_k": 3}, "of_the_future": 7, "init_lora_weights": "loftq", "r": 0}
    found = inspect_folder(change(save(), **wrong))
    assert [reason.partition(":")[0] for reason in found.reasons] == [
        "arrow_config",
        "use_qalora",
        "of_the_future",
        "init_lora_weights",
        "r",
    ]
    assert found.settings == {name: value for name, value in wrong.items() if name != "r"}
    assert found.rank is None
    assert {module.scale for module in found.modules} == {None}
    assert {module.rank for module in found.modules} == {4}, "by its tensors"


def test_every_reason_of_the_file_is_told(save, edit_tensors):
    def spoil(tensors):
        tensors["model.stray"] = torch.ones(2)
        tensors[UP + "A.weight"] = torch.ones(4, 32, dtype=torch.int32)
        tensors[UP + "B.weight"][2, 1] = torch.inf
        tensors[UP.replace("layers.0", "layers.1") + "B.weight"][0, 0] = torch.nan

    found = inspect_folder(edit_tensors(save(), spoil))
    assert sorted(found.reasons) == sorted(
        [
            "model.stray: is no tensor that a LoRA adapter has",
            f"{UP}A.weight: dtype I32 is not supported",
            f"{UP}B.weight: holds NaN or infinity",
            f"{UP.replace('layers.0', 'layers.1')}B.weight: holds NaN or infinity",
        ]
    )


def without(name):
    return lambda folder: (folder / name).unlink()


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BROKEN = {
    "no-folder": (shutil.rmtree, "folder: does not exist"),
    "no-config": (without(CONFIG), "adapter_config.json: is missing"),
    "no-weights": (without(WEIGHTS), "adapter_model.safetensors: is missing"),
    "pickled": (pickled, "adapter_model.bin: pickled weights can run code and are refused"),
    "not-json": (written(CONFIG, b"{"), "adapter_config.json: is not JSON"),
    "empty-object": (written(CONFIG, b"{}"), "peft_type: only 'LORA' is supported, got None"),
    "a-list": (written(CONFIG, b"[]"), "adapter_config.json: must be one JSON object"),
    "deep": (written(CONFIG, b"[" * 10**6), "adapter_config.json: is not JSON"),
    "not-safetensors": (written(WEIGHTS, b"x" * 100), "adapter_model.safetensors: is not a safetensors file"),
    "empty-file": (written(WEIGHTS, b""), "adapter_model.safetensors: is truncated"),
    "cut": (cut, "adapter_model.safetensors: is truncated"),
    "header": (written(WEIGHTS, struct.pack("<Q", 2) + b"[]"), "adapter_model.safetensors: is corrupt"),
    "binary-config": (written(CONFIG, b"\xff\xfe{"), "adapter_config.json: is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_a_reason(case, save):
    folder = save()
    spoil, reason = BROKEN[case]
    spoil(folder)
    assert inspect_folder(folder).reasons[0].startswith(reason)


def test_what_is_unreadable_hides_nothing_else(save):
    folder = save()
    (folder / CONFIG).write_text("{")
    assert len(inspect_folder(folder).modules) == 14
    shutil.rmtree(folder)
    folder = save(use_dora=True)
    (folder / WEIGHTS).unlink()
    assert inspect_folder(folder).settings == {"use_dora": True}


def test_an_adapter_that_is_not_converted_and_one_that_can_be(llama, tmp_path: Path):
    train("pissa", llama, tmp_path, convert=False)
    found = inspect_folder(tmp_path / "raw")
    assert [reason.partition(":")[0] for reason in found.reasons] == ["init_lora_weights"]
    assert (found.initial, {module.rank for module in found.modules}) == ("", {4})
    shutil.copytree(tmp_path / "initial", tmp_path / "raw/pissa_init")
    found = inspect_folder(tmp_path / "raw")
    assert (found.initial, {module.rank for module in found.modules}, found.reasons) == ("pissa_init", {8}, [])
    assert {module.scale for module in found.modules} == {1.5}
    (tmp_path / "raw/pissa_init" / WEIGHTS).write_bytes(b"")
    found = inspect_folder(tmp_path / "raw")
    assert found.reasons == ["pissa_init/adapter_model.safetensors: is truncated: 0 bytes"]
    assert len(found.modules) == 4


def test_a_link_out_of_the_folder_is_followed_only_if_it_may_be(save, tmp_path: Path):
    folder = save()
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    assert "is a symbolic link that leaves" in inspect_folder(folder).reasons[0]
    assert inspect_folder(folder, (tmp_path,)).reasons == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_nothing_is_raised_whatever_the_files_hold(data, save, tmp_path: Path):
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(save(target_modules=["q_proj"]), folder)
        shutil.copytree(folder, tmp_path / "whole")
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray((tmp_path / "whole" / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 1200) - 1))] = data.draw(st.integers(0, 255))
    for each in (CONFIG, WEIGHTS):
        shutil.copy(tmp_path / "whole" / each, folder / each)
    (folder / name).write_bytes(content)
    json.dumps(inspect_folder(folder).reasons)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_nothing_is_raised_whatever_a_field_holds(data, save, tmp_path: Path):
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        save("fuzzed", target_modules=["q_proj"])
        shutil.copy(folder / CONFIG, tmp_path / "whole.json")
    fields = json.loads((tmp_path / "whole.json").read_text())
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(VALUES)
    (folder / CONFIG).write_text(json.dumps(fields))
    found = inspect_folder(folder)
    assert not any("Error: " in reason for reason in found.reasons), "a reason that names no field"
