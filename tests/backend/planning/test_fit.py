# SPDX-License-Identifier: Apache-2.0
"""What `multilora inspect` says of an adapter and a model is what an engine does with them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gpu_models
from extras_models import driver_of, save_trained
from gpu_driver import Driver, free_drivers
from initial_adapters import train
from multilora_backend.adapters.state import AdapterState
from multilora_backend.config import Config
from multilora_backend.core import LoraSite
from multilora_backend.models.fusion import base_model
from multilora_backend.models.loader import load_model, outline
from multilora_backend.planning.fit import Report, Running, adapter_folders, inspect
from multilora_backend.planning.plan import machine_of
from multilora_backend.planning.stored import StoredLinear, StoredWeights

WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj."


def edited(edit: Callable[[dict[str, torch.Tensor]], Any], metadata: dict[str, str] | None = None):
    def apply(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata)

    return apply


def configured(**fields: Any):
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return apply


def with_config(**fields: Any):
    def apply(folder: Path) -> None:
        own = json.loads((folder.parents[1] / "model/config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**own, **fields}))

    return apply


def zero_b(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def nothing(folder: Path) -> None:
    pass


BIASES = {"bias": "all", "lora_bias": True}
TABLES = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
ADAPTERS: dict[str, tuple[dict[str, Any], Callable[[Path], None]]] = {
    "plain": ({"r": 5}, nothing),
    "one-module": ({"target_modules": ["v_proj"]}, nothing),
    "ranks": ({"rank_pattern": {"q_proj": 20}}, nothing),
    "dora": ({"use_dora": True}, nothing),
    "biases": (BIASES, nothing),
    "norms": ({"modules_to_save": ["norm"], "target_modules": ["q_proj"]}, nothing),
    "tables": (TABLES, nothing),
    "lora-on-tables": ({"target_modules": ["embed_tokens", "lm_head"]}, nothing),  # with copies of the base's
    "tokens": ({"trainable_token_indices": [3, 9]}, nothing),
    "activated": ({"alora_invocation_tokens": [5, 6]}, nothing),
    "own-base": ({}, with_config()),
    "zero": ({}, edited(zero_b)),
    "zero-biases": ({"bias": "lora_only"}, edited(lambda tensors: [t.zero_() for t in tensors.values()])),
    # and what is refused
    "shape": ({}, edited(lambda tensors: tensors.update({Q + "lora_A.weight": torch.ones(8, 3)}))),
    "stray": (
        {},
        edited(lambda tensors: tensors.update({Q.replace("q_proj", "r_proj") + "lora_A.weight": torch.ones(1)})),
    ),
    "missing": ({}, edited(lambda tensors: tensors.pop(Q + "lora_B.weight"))),
    "nan": ({}, edited(lambda tensors: tensors[Q + "lora_B.weight"].fill_(torch.nan))),
    "nan-magnitude": (
        {"use_dora": True},
        edited(lambda tensors: tensors[Q + "lora_magnitude_vector"].fill_(torch.inf)),
    ),
    "activated-dora": ({"use_dora": True}, configured(alora_invocation_tokens=[5])),
    "huge": ({"r": 600}, nothing),
    "many-extras": ({"vocabulary": 300, "target_modules": ["q_proj"]}, nothing),
    "config": ({}, configured(use_qalora=True)),
    "other-base": ({}, with_config(num_hidden_layers=3)),
    "other-class": (
        {},
        configured(auto_mapping={"base_model_class": "PhiForCausalLM", "parent_library": "transformers.models.phi"}),
    ),
    "other-print": ({}, edited(lambda tensors: None, {"base_model_fingerprint": "0" * 64})),
    "pickled": ({}, lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin")),
    "unconverted": ({}, configured(init_lora_weights="pissa")),
}
REFUSED = list(ADAPTERS)[list(ADAPTERS).index("shape") :]
SETTINGS = {"adapter_device_bytes": 2**21, "adapter_extras_bytes": 2**17, "dtype": "float32"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    gpu_models.save_model(folder / "model", attention_bias=True, mlp_bias=True)
    for seed, (name, (fields, change)) in enumerate(ADAPTERS.items()):
        change(save_trained(folder / "model", folder / "adapters" / name, seed, **fields))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    train("pissa", model, folder / "train", convert=False)
    (folder / "train/initial").rename(folder / "train/raw/pissa_init")
    (folder / "train/raw").rename(folder / "adapters/pissa")
    return folder


@pytest.fixture(scope="module")
def reports(root: Path) -> dict[str, Report]:
    return {Path(report.adapter.folder).name: report for report in inspected(root)}


def inspected(root: Path, **settings: Any) -> list[Report]:
    config = Config(
        model=str(root / "model"), adapters=str(root / "adapters"), device="cpu", **{**SETTINGS, **settings}
    )
    return inspect(adapter_folders(root / "adapters"), "", Running.of(config, machine_of(config)))


@pytest.fixture(scope="module")
def driver(root: Path) -> Iterator[Driver]:
    yield driver_of(root, "grouped", **SETTINGS)
    free_drivers()


@pytest.mark.parametrize("name", [*ADAPTERS, "pissa"])
def test_the_verdict_is_the_engines(name: str, reports: dict[str, Report], driver: Driver):
    manager = driver.engine.adapters
    driver.submit([3, 5, 6, 4], name, max_tokens=1)
    driver.settle()
    shown, report = manager.show(name), reports[name]
    fit = report.fit
    assert fit is not None
    assert fit.unchecked == ""
    assert fit.reason == ("" if shown.state == AdapterState.ACTIVE.value else shown.reason)
    assert bool(report.reasons) == bool(fit.reason) == (name in REFUSED)
    if name in REFUSED:
        return
    assert (fit.rank, fit.no_effect, fit.host_bytes) == (shown.rank, shown.no_effect, shown.bytes)
    assert fit.version == shown.version
    assert fit.pool_bytes == fit.padded_rank * manager.pool.bytes_per_rank
    assert fit.pool_ranks == manager.pool.num_ranks
    own = sum(extra.device_bytes for extra in fit.extras)
    assert own <= fit.extras_bytes < own + 4096


def test_what_has_no_effect_is_told(reports: dict[str, Report]):
    told = {name for name, report in reports.items() if report.fit is not None and report.fit.no_effect}
    assert told == {"zero"}, "zero-biases takes the base's biases away"


def test_modules_take_what_all_linears_take(reports: dict[str, Report]):
    fit, one, ranks = (reports[name].fit for name in ("plain", "one-module", "ranks"))
    assert fit is not None
    assert one is not None
    assert ranks is not None
    assert sum(module.device_bytes for module in fit.modules) == fit.pool_bytes
    assert {module.site for module in one.modules} == {f"model.layers.{i}.self_attn.qkv_proj" for i in (0, 1)}
    assert {module.device_bytes for module in one.modules} == {8 * (128 + 128) * 4}
    assert {module.rank for module in ranks.modules if "q_proj" in module.module} == {20}
    assert {module.scale for module in ranks.modules if "q_proj" in module.module} == {12 / 20}
    assert ranks.padded_rank == 24


def test_who_can_be_part_of_a_sum(reports: dict[str, Report]):
    def why(name: str) -> str:
        fit = reports[name].fit
        return "" if fit is None else fit.not_in_sums

    assert why("plain") == ""
    assert why("activated") == "an adapter with alora_invocation_tokens cannot be part of a sum"
    assert all(why(name).startswith("an adapter with DoRA, trained") for name in ("dora", "norms", "tables", "tokens"))


def test_without_the_models_weights_it_says_what_it_left_out(root: Path, tmp_path: Path, reports: dict[str, Report]):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(root / "model" / name, tmp_path / "model")
    (tmp_path / "adapters").symlink_to(root / "adapters")
    for report in inspected(tmp_path):
        name, fit = Path(report.adapter.folder).name, report.fit
        assert fit is not None
        assert fit.fingerprint == ""
        before = reports[name].fit
        assert before is not None
        assert bool(fit.unchecked) == (bool(before.extras) or name == "nan-magnitude"), name
        if fit.unchecked:
            assert fit.unchecked.endswith("holds no model.safetensors")
            assert fit.no_effect is None
            assert fit.not_in_sums.startswith("an adapter with DoRA, trained") or name in REFUSED
        assert bool(report.reasons) == (name in REFUSED), name


@pytest.mark.parametrize("family", gpu_models.FAMILIES)
def test_stored_weights_are_those_that_run(family: str, tmp_path: Path):
    more = {"attention_bias": True} if family == "llama" else {}
    gpu_models.save_model(tmp_path, family, **more)
    config = Config(model=str(tmp_path), device="cpu", dtype="float32")
    running, meta = load_model(config), base_model(outline(config, torch.device("cpu")).module)
    base, stored = base_model(running.module), StoredWeights(tmp_path, torch.float32)
    for index, linear in base.linears.items():
        site: LoraSite = running.sites[index]
        own = StoredLinear(stored, site, meta.linears[index].base_bias is not None)
        if site.parameter:
            continue  # experts and routers have nothing that is computed from their weights
        assert own.base_weight.equal(linear.base_weight)
        assert (own.base_bias is None) == (linear.base_bias is None)
        assert own.base_bias is None or own.base_bias.equal(linear.base_bias)
    for name, weight in base.norms.items():
        assert stored.read(f"{name}.weight", meta.norms[name].shape).equal(weight)
    assert base.embedding is not None
    assert stored.read("model.embed_tokens.weight", base.embedding.shape).equal(base.embedding)


def test_experts(tmp_path: Path):
    gpu_models.save_model(tmp_path / "model", "mixtral")
    parameters = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 4}
    save_trained(tmp_path / "model", tmp_path / "adapters/experts", target_modules=["q_proj"], **parameters)
    (report,) = inspected(tmp_path, adapter_device_bytes=2**23)
    fit = report.fit
    assert fit is not None
    assert fit.reason == ""
    assert fit.not_in_sums == "an adapter with LoRA on experts cannot be part of a sum"
    by_site = {module.site: module for module in fit.modules}
    assert by_site["model.layers.1.mlp.experts.gate_up_proj"].device_bytes == 8 * 4 * (128 + 2 * 192) * 4
    assert {module.rank for module in fit.modules} == {4}
    (report,) = inspected(tmp_path, adapter_device_bytes=2**23, lora_experts=False)
    assert re.match(r"target_parameters: 'mlp\.experts\.\w+' names no parameter", report.reasons[0])


def test_a_folder_of_adapters_and_one_of_none(root: Path, tmp_path: Path):
    assert adapter_folders(root / "adapters") == sorted((root / "adapters").iterdir())[: len(ADAPTERS) + 1]
    assert adapter_folders(root / "adapters/plain") == [root / "adapters/plain"]
    assert adapter_folders(root / "adapters/pissa") == [root / "adapters/pissa"], "its initial one is no other"
    assert adapter_folders(tmp_path) == [tmp_path]
    assert adapter_folders(tmp_path / "none") == [tmp_path / "none"]
