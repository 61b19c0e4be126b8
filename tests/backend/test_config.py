# SPDX-License-Identifier: Apache-2.0
"""The configuration: where values come from, which one wins, and that no mistake passes silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multilora_backend.config import VLLM_IGNORED, Config, load
from multilora_backend.errors import ErrorCode, MultiloraError


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "multilora/1").mkdir(parents=True)
    return tmp_path / "multilora"


def write(model_dir: Path, name: str, content: object) -> None:
    (model_dir / "1" / name).write_text(content if isinstance(content, str) else json.dumps(content))


def refused(model_dir: Path, parameters: dict | None = None, environ: dict | None = None) -> str:
    with pytest.raises(MultiloraError) as caught:
        load(model_dir, "1", {"model": "m"} if parameters is None else parameters, environ or {})
    return caught.value.message


def test_precedence_is_environment_then_parameters_then_model_json(model_dir: Path):
    write(model_dir, "model.json", {"model": "/j", "max_num_seqs": 1, "max_loras": 1, "block_size": 8})
    parameters = {"model": "/p", "max_num_seqs": "2", "max_loras": "2"}
    config, _ = load(model_dir, "1", parameters, {"MULTILORA_MAX_NUM_SEQS": "3", "HOME": "/", "MLENGINE_X": "y"})
    assert (config.model, config.max_num_seqs, config.max_loras, config.block_size) == ("/p", 3, 2, 8)


def test_paths_are_relative_to_where_they_are_written(model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    config, _ = load(model_dir, "1", {"model": "../base", "adapters": "loras"}, {})
    assert config.model == str(model_dir.parent / "base")
    assert config.adapters == str(model_dir / "loras")
    monkeypatch.chdir(model_dir.parent)
    config, _ = load(model_dir, "1", {}, {"MULTILORA_MODEL": "here"})
    assert config.model == str(model_dir.parent / "here")
    assert not config.lora_enabled
    write(model_dir, "model.json", {"model": "there"})
    assert load(model_dir, "1", {}, {})[0].model == str(model_dir / "1/there")


def test_a_vllm_deployment(model_dir: Path):
    arguments = {"model": "/m", "enable_lora": "true", "max_loras": 4, "max_lora_rank": 64, "seed": 1}
    arguments |= {"enforce_eager": True, "async_scheduling": False}
    write(model_dir, "model.json", {**arguments, "tensor_parallel_size": 1, "trust_remote_code": False})
    write(model_dir, "multi_lora.json", {"doll": "/d"})
    config, notes = load(model_dir, "1", {"REPORT_CUSTOM_METRICS": "false"}, {})
    assert config.adapters == str(model_dir / "1/multi_lora.json")
    assert config.max_loras == 4
    assert config.enforce_eager
    assert config.async_scheduling == "false"
    assert not config.report_custom_metrics
    assert len(notes) == 2
    assert all(
        any(name in note and VLLM_IGNORED[name] in note for note in notes) for name in arguments if name in VLLM_IGNORED
    )


def test_enable_lora_without_its_file(model_dir: Path):
    write(model_dir, "model.json", {"model": "/m", "enable_lora": True})
    assert "multi_lora.json: is missing" in refused(model_dir, {})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("{", "model.json: is not JSON"),
        ([], "one JSON object"),
        ({"model": "/m", "tensor_parallel_size": 2}, "tensor_parallel_size: only 1 is supported"),
        ({"model": "/m", "quantization": "awq"}, "quantization: only None"),
        ({"model": "/m", "trust_remote_code": True}, "trust_remote_code"),
        ({"model": "/m", "max_num_seq": 3}, "model.json: unknown key 'max_num_seq'"),
        ({"model": "/m", "enable_lora": "maybe"}, "enable_lora: must be true or false"),
        ({"model": 3}, "model: must be of type str"),
    ],
)
def test_a_bad_model_json(model_dir: Path, arguments: object, problem: str):
    write(model_dir, "model.json", arguments)
    assert problem in refused(model_dir, {})


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({}, "model: is required"),
        ({"modle": "m"}, "config.pbtxt parameters: unknown key 'modle'"),
        ({"model": "m", "max_loras": "-1"}, "max_loras: must be 0 or more, got -1"),
        ({"model": "m", "max_loras": "two"}, "max_loras: must be of type int, got 'two'"),
        ({"model": "m", "max_num_seqs": "0"}, "max_num_seqs: must be at least 1"),
        ({"model": "m", "device": "tpu"}, "device: must be one of auto, cpu, cuda, got 'tpu'"),
        ({"model": "m", "enable_prefix_caching": "perhaps"}, "enable_prefix_caching: must be true or false"),
        ({"model": "m", "gpu_memory_utilization": "1.5"}, "gpu_memory_utilization: must be in (0, 1], got 1.5"),
        ({"model": "m", "gpu_memory_utilization": "nan"}, "gpu_memory_utilization: must be in (0, 1]"),
        ({"model": "m", "max_overtake_s": "-0.1"}, "max_overtake_s: must be 0 or more"),
        (
            {"model": "m", "engine_start_timeout_s": "inf"},
            "engine_start_timeout_s: must be above 0, up to 9223372036, got inf",
        ),
        ({"model": "m", "adapters_watch_s": "1e300"}, "adapters_watch_s: must be 0 to 9223372036, got 1e+300"),
    ],
)
def test_a_bad_parameter(model_dir: Path, parameters: dict, problem: str):
    assert problem in refused(model_dir, parameters)


def test_a_bad_environment(model_dir: Path):
    assert "environment (MULTILORA_*): unknown key 'modell'" in refused(model_dir, environ={"MULTILORA_MODELL": "m"})


def test_it_travels_as_json():
    config = Config(model="/m", max_loras=3, enable_prefix_caching=False)
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(MultiloraError) as caught:
        Config.from_json('{"model": "/m", "colour": "red"}')
    assert caught.value.code is ErrorCode.INVALID_ARG
