# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts at tiny shapes on the CPU: they run, and what they write is what docs/performance.md reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from benchmark_scripts import benchmark_scripts


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with benchmark_scripts() as modules:
        yield modules


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(script: ModuleType, workdir: Path, *arguments: str) -> dict[str, Any]:
    path = workdir / f"{script.__name__}.json"
    assert script.main([*arguments, "--workdir", str(workdir), "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert str(workdir) not in path.read_text()
    return result


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen3"])
def test_a_made_model_is_what_transformers_expects(scripts: SimpleNamespace, workdir: Path, name: str) -> None:
    folder = scripts.weights.Workdir(workdir, name, "cpu").model()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = dict(model.named_parameters())
    assert 0.9 < weights["model.norm.weight"].float().mean() < 1.1
    assert all(weight.float().std() > 0.01 for weight in weights.values())
    first, second = (weights[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["tiny-gpu", "llama-3.2-1b", "llama-3.1-8b", "qwen3-14b"])
def test_a_shape_names_every_tensor_of_its_model(scripts: SimpleNamespace, name: str) -> None:
    shape = scripts.shapes.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.config))
    expected = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    if shape.tie_word_embeddings:
        del expected["lm_head.weight"]
    named = [*shape.ends(), *(tensor for i in range(shape.num_hidden_layers) for tensor in shape.layer(i))]
    assert dict(named) == expected


def test_an_adapter_has_the_bytes_that_its_rank_takes(scripts: SimpleNamespace, workdir: Path) -> None:
    maker = scripts.weights.Workdir(workdir, "tiny", "cpu")
    catalogue = json.loads(maker.adapters(["r24-0", "r24-1"]).read_text())
    with safe_open(Path(catalogue["r24-1"]) / "adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(tensor.nbytes for tensor in tensors.values()) == scripts.weights.device_bytes(maker.shape, ["r24-1"])
    assert scripts.weights.device_bytes(maker.shape, ["r17-0"]) == scripts.weights.device_bytes(maker.shape, ["r24-0"])


def test_what_was_made_is_kept(scripts: SimpleNamespace, workdir: Path) -> None:
    maker = scripts.weights.Workdir(workdir, "tiny", "cpu")
    before = (maker.model() / "config.json").stat().st_mtime_ns
    assert (maker.model() / "config.json").stat().st_mtime_ns == before
    assert not list((workdir / "tiny").glob(".*"))


SMALL = ("--requests", "6", "--input", "5", "--output", "4", "--max-num-seqs", "4")


def test_engine(scripts: SimpleNamespace, workdir: Path) -> None:
    result = run(scripts.engine, workdir, *SMALL, "--mixes", "off,0,3,mean")
    assert list(result["best"]) == ["off", "0", "3", "mean"]
    for mix, runs in result["runs"].items():
        assert len(runs) == 2
        assert result["best"][mix] == max(one["tokens_per_s"] for one in runs) > 0
        assert all(one["loads"] == 0 for one in runs), "a load was timed"
    assert result["start"]["on"]["ready_s"] > 0
    assert "of own base" in scripts.tables.render(result)


def test_engine_with_fewer_adapters_resident_than_asked_for(scripts: SimpleNamespace, workdir: Path) -> None:
    limits = ("--max-loras", "1", "--resident", "2")
    result = run(scripts.engine, workdir, *SMALL, "--mixes", "4", *limits, "--repeats", "1")
    assert result["runs"]["4"][0]["loads"] > 0


def test_ranks_of_the_mixes(scripts: SimpleNamespace) -> None:
    ranks = {
        mix: [scripts.weights.rank_and_index(name)[0] for name in scripts.engine.adapters_of(mix, 16)]
        for mix in ("off", "0", "4", "mixed", "mean")
    }
    assert ranks["off"] == ranks["0"] == []
    assert ranks["4"] == [16] * 4
    assert ranks["mixed"] == [8, 16, 32, 64] * 4
    assert sum(ranks["mean"]) == sum(ranks["mixed"])
    assert len(set(ranks["mean"])) == 1


def test_latency(scripts: SimpleNamespace, workdir: Path) -> None:
    result = run(scripts.latency, workdir, "--batches", "1,3", "--rounds", "2", "--input", "5", "--output", "4")
    assert [(row["batch"], row["adapters"]) for row in result["rows"]] == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 3)]
    assert [row["ttft"]["count"] for row in result["rows"]] == [2, 2, 6, 6, 6]
    assert [row["inter_token"]["count"] for row in result["rows"]] == [6, 6, 18, 18, 18]
    assert scripts.tables.render(result).count("\n| ") == 6


@pytest.mark.parametrize("source", ["disk", "host"])
def test_latency_during_loads(scripts: SimpleNamespace, workdir: Path, source: str) -> None:
    traffic = ("--max-num-seqs", "16", "--input", "3", "--output", "24", "--repeats", "1", "--load-interval", "0.002")
    result = run(scripts.latency, workdir, "--load-during", "--load-from", source, *traffic)
    quiet, loading = result["rows"]
    assert quiet["load"]["count"] == 0 < loading["load"]["count"]
    assert quiet["inter_token"]["count"] > 0
    assert f"loads from {source}" in scripts.tables.render(result)


@pytest.mark.parametrize("source", ["host", "disk"])
def test_misses(scripts: SimpleNamespace, workdir: Path, source: str) -> None:
    result = run(scripts.misses, workdir, "--rounds", "4", "--input", "20", "--load-from", source)
    assert [row["kind"] for row in result["rows"]] == ["base", "hit", "miss"]
    assert all(row["ttft"]["count"] == 4 for row in result["rows"])
    assert f"miss, from {source}" in scripts.tables.render(result)


def test_profile_steps(scripts: SimpleNamespace, workdir: Path) -> None:
    result = run(
        scripts.profile_steps, workdir, "--max-num-seqs", "4", "--adapters", "2", "--input", "5", "--steps", "4"
    )
    assert 0 < result["kernel_busy"] <= 1
    assert result["kernels"][0]["us_per_step"] >= result["kernels"][-1]["us_per_step"]
    assert "the GPU is idle" in scripts.tables.render(result)


@pytest.mark.e2e
def test_through_triton(scripts: SimpleNamespace, workdir: Path) -> None:
    traffic = ("--streams", "3", "--requests", "6", "--input", "5", "--output", "6", "--clients", "1")
    result = run(scripts.through_triton, workdir, "--num-adapters", "2", *traffic)
    for way in ("engine", "triton"):
        assert result[way]["tokens_per_s"] > 0
        assert result[way]["open_ttft"]["count"] == result[way]["closed_ttft"]["count"] == 6
        assert result[way]["begin_ttft"]["count"] == result[way]["follow_ttft"]["count"] == 3
    assert {"tritonserver", "stub", "engine"} <= result["triton"]["cores_used"].keys()
    assert scripts.tables.render(result).count("TTFT p50") == 4


def test_a_front_end_that_cannot_import_us_is_named_before_anything_starts(
    scripts: SimpleNamespace, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = workdir / "stub" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("TRITON_STUB_ENV", str(workdir / "stub"))
    assert scripts.through_triton.main(["--workdir", str(workdir)]) == 1
    assert "multilora.pth" in capsys.readouterr().err
