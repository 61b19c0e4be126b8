# SPDX-License-Identifier: Apache-2.0
"""What an adapter says of the model that it was trained on is compared with the model that runs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from multilora_backend.adapters.base_files import SAMPLE_BYTES, base_fingerprint, samples
from multilora_backend.adapters.lineage import ARCHITECTURE
from multilora_backend.adapters.peft import check_adapter, fingerprint, read_adapter
from multilora_backend.adapters.tensors import TensorInfo
from multilora_backend.errors import MultiloraError
from multilora_backend.models.fusion import base_model, fuse

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def running(folders):
    """Sites and base of the model in its folder."""
    model = LlamaForCausalLM.from_pretrained(folders[False])
    return fuse(model), base_model(model, folders[False])


def refused(folder: Path, running, match: str) -> str:
    sites, base = running
    with pytest.raises(MultiloraError, match=match) as read:
        read_adapter(folder, sites, torch.float32, base=base)
    with pytest.raises(MultiloraError) as checked:
        check_adapter(folder, sites, base=base)
    assert checked.value.message == read.value.message
    return read.value.message


def served(folder: Path, running) -> None:
    sites, base = running
    assert check_adapter(folder, sites, base=base).rank == read_adapter(folder, sites, torch.float32, base=base).rank


def record(folder: Path, fingerprint: str) -> Path:
    """As docs/adapters.md says."""
    path = folder / WEIGHTS
    save_file(load_file(path), path, metadata={"format": "pt", "base_model_fingerprint": fingerprint})
    return folder


def beside(folder: Path, model: Path, **changes) -> Path:
    """The base's config.json in the adapter's folder."""
    fields = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    return folder


def test_a_copy_of_the_bases_config_is_compared(save, folders, running):
    folder = beside(save(), folders[False])
    served(folder, running)
    served(beside(folder, folders[False], rms_norm_eps=1.0, transformers_version="4.1", _name_or_path="x"), running)
    settings = running[1].identity.settings
    compared = {name for name in ARCHITECTURE if settings.get(name) is not None}
    counts = {name for name in settings if re.match(r"num_|\w+_size$", name)} - {"vocab_size"}
    assert compared == {"model_type", "head_dim", *counts}
    for name in sorted(compared):
        own = settings[name]
        other = "mistral" if name == "model_type" else own + 1
        refused(
            beside(folder, folders[False], **{name: other}), running, f"^config.json: {name} is {other!r}, the model"
        )
    served(beside(folder, folders[False], head_dim=None, num_experts=8), running)
    sparse = dataclasses.replace(running[1].identity, settings={**settings, "num_local_experts": 4})
    running = running[0], dataclasses.replace(running[1], identity=sparse)
    refused(beside(folder, folders[False], num_experts=8), running, "^config.json: num_experts is 8, the model that")
    served(beside(folder, folders[False], num_experts=4), running)


def test_the_vocabulary_is_the_bases_or_the_adapters_own(save, folders, running, edit_tensors, change):
    folder = beside(save(), folders[False], vocab_size=33)
    refused(folder, running, "^config.json: vocab_size is 33, the model that runs has 31")
    tables = {f"base_model.model.{name}.weight": torch.ones(33, 32) for name in ("model.embed_tokens", "lm_head")}
    change(edit_tensors(folder, lambda tensors: tensors.update(tables)), modules_to_save=["embed_tokens", "lm_head"])
    served(folder, running)
    served(beside(folder, folders[False]), running)
    served(beside(save(), folders[False], vocab_size=30), running)  # padded rows say nothing


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 10**5, '{"num_hidden_layers": 99}', '{"model_type": "x"}' + " " * 2**20]
)
def test_a_config_that_is_no_models_says_nothing(text, save, running):
    folder = save()
    (folder / "config.json").write_text(text)
    served(folder, running)


def test_a_config_outside_of_the_folder_is_not_opened(save, folders, running, tmp_path):
    folder = save()
    (folder / "config.json").symlink_to(beside(tmp_path, folders[False], num_hidden_layers=3) / "config.json")
    served(folder, running)


def test_a_folder_with_another_config_is_another(save, folders):
    folder = save()
    before = fingerprint(folder)
    assert fingerprint(beside(folder, folders[False])) != before


def test_the_text_part_of_a_larger_models_config_counts(save, folders, running):
    folder = save()
    inner = json.loads((folders[False] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "vision", "text_config": inner}))
    served(folder, running)
    inner["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps({"model_type": "vision", "text_config": inner}))
    refused(folder, running, "^config.json: num_hidden_layers")


@pytest.mark.parametrize(
    ("mapping", "other"),
    [
        (
            {
                "base_model_class": "MistralForCausalLM",
                "parent_library": "transformers.models.mistral.modeling_mistral",
            },
            1,
        ),
        ({"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}, 0),
        ({"base_model_class": "MyForCausalLM", "parent_library": "my.module"}, 0),
        ({"base_model_class": "PreTrainedModel", "parent_library": "transformers.models.auto"}, 0),
        ({"base_model_class": 3, "parent_library": None}, 0),
        (None, 0),
    ],
)
def test_the_class_that_peft_records(mapping, other, save, running, change):
    folder = change(save(), auto_mapping=mapping)
    if other:
        refused(
            folder, running, "^auto_mapping: the adapter is for a MistralForCausalLM, the model is a LlamaForCausalLM"
        )
    else:
        served(folder, running)


def test_a_recorded_fingerprint_must_be_the_bases(save, folders, running):
    right = base_fingerprint(folders[False])
    served(record(save(), right), running)
    wrong = base_fingerprint(folders[True])
    message = refused(record(save(), wrong), running, "^base_model_fingerprint: ")
    assert wrong in message
    assert right in message
    refused(record(save(), right.upper()), running, "^base_model_fingerprint: must be 64 hexadecimal digits")
    sites, _ = running
    with pytest.raises(MultiloraError, match="needs the base model"):
        check_adapter(record(save(), right), sites)


def test_other_metadata_and_names_that_sound_alike_say_nothing(save, running):
    folder = save()
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"note": "base_model_fingerprint"})
    served(folder, running)


def test_the_fingerprint_is_of_the_tensors_and_not_of_the_files(folders, tmp_path: Path):
    whole = load_file(folders[False] / "model.safetensors")
    names = sorted(whole)
    shards = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: whole[name] for name in own}, tmp_path / file)
    weight_map = {name: file for file, own in shards.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert base_fingerprint(tmp_path) == base_fingerprint(folders[False])
    shutil.copy(folders[True] / "model.safetensors", tmp_path)  # which transformers prefers to an index
    assert base_fingerprint(tmp_path) == base_fingerprint(folders[True])
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(MultiloraError, match=r"^model: .* holds no a\.safetensors"):
        base_fingerprint(tmp_path)


def test_every_tensor_counts(folders, tmp_path: Path):
    shutil.copytree(folders[False], tmp_path, dirs_exist_ok=True)
    before, path = {base_fingerprint(tmp_path)}, tmp_path / "model.safetensors"
    whole = load_file(path)
    for name, tensor in whole.items():
        save_file({**whole, name: tensor + 1}, path)
        assert base_fingerprint(tmp_path) not in before
        before.add(base_fingerprint(tmp_path))
    other = {"lm_head.weight": "lm_head.weighu"}  # in the same place of the order
    save_file({other.get(name, name): tensor for name, tensor in whole.items()}, path)
    assert base_fingerprint(tmp_path) not in before
    save_file({name: tensor.half() if tensor.ndim == 1 else tensor for name, tensor in whole.items()}, path)
    assert base_fingerprint(tmp_path) not in before


@given(start=st.integers(0, 10**6), size=st.integers(0, 50 * SAMPLE_BYTES))
def test_samples_lie_within_the_tensor_from_its_first_byte_to_its_last(start: int, size: int):
    pieces = samples(TensorInfo("t", "U8", (size,), start, start + size))
    assert pieces[0][0] == start
    assert sum(pieces[-1]) == start + size
    ends = [at + length for at, length in pieces]
    assert all(end <= at for end, (at, _) in zip(ends, pieces[1:], strict=False)), "no byte is read twice"
    assert sum(length for _, length in pieces) == min(size, 4 * SAMPLE_BYTES)
