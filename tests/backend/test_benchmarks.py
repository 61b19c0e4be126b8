# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts at tiny shapes on the CPU: they run, and what they write is what docs/performance.md reads."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("engine", "latency", "misses", "plot", "profile_steps", "report", "shapes", "tables", "through_triton",
           "traffic", "vllm_figures", "weights", "workload")  # fmt: skip
HELPERS = ("client_processes", "engine_socket")


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts as modules, under their own names, which nothing else sees afterwards."""
    before = {name: sys.modules.pop(name) for name in (*SCRIPTS, *HELPERS) if name in sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in (*SCRIPTS, *HELPERS):
            sys.modules.pop(name, None)
        sys.modules.update(before)


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


def test_gaps_count_from_the_moment_asked_for(scripts: SimpleNamespace) -> None:
    timing = scripts.workload.Timing(1.0, [3.0, 4.0, 6.0, 9.0])
    assert timing.ttft == 2.0
    assert timing.gaps() == [1.0, 2.0, 3.0]
    assert timing.gaps(since=4.0) == [2.0, 3.0]


def test_profile_steps(scripts: SimpleNamespace, workdir: Path) -> None:
    result = run(
        scripts.profile_steps, workdir, "--max-num-seqs", "4", "--adapters", "2", "--input", "5", "--steps", "4"
    )
    assert 0 < result["kernel_busy"] <= 1
    assert result["kernels"][0]["us_per_step"] >= result["kernels"][-1]["us_per_step"]
    assert "the GPU is idle" in scripts.tables.render(result)


def test_busy_is_the_union_of_overlapping_kernels(scripts: SimpleNamespace) -> None:
    interval = scripts.profile_steps.Interval
    kernels = [interval(0, 10, "a"), interval(2, 4, "inside"), interval(9, 12, "b"), interval(15, 16, "c")]
    busy, gaps = scripts.profile_steps.busy_and_gaps(reversed(kernels))
    assert busy == 13
    assert gaps == [(3, "b", "c")]


def test_an_idle_gpu_is_seen(scripts: SimpleNamespace) -> None:
    """Ten steps of 80 us of kernels in 100 us, and the edges of the trace busier than its middle."""
    steps = 10 + 2 * scripts.profile_steps.EDGE_STEPS
    middle = range(scripts.profile_steps.EDGE_STEPS, steps - scripts.profile_steps.EDGE_STEPS)
    kernels = [
        scripts.profile_steps.Interval(100 * i, 100 * i + (80 if i in middle else 100), "k") for i in range(steps)
    ]
    found = scripts.profile_steps.summary(kernels, 10)
    assert found["kernel_busy"] == pytest.approx(0.8, abs=0.03)
    assert found["kernels"][0]["calls_per_step"] == pytest.approx(1, abs=0.11)
    assert [gap["count_per_step"] > 0 for gap in found["gaps"]] == [False, False, True, False]


def test_traffic(scripts: SimpleNamespace) -> None:
    requests = [scripts.traffic.Request(str(i), "", at) for i, at in enumerate(scripts.traffic.poisson(10.0, 500))]
    assert requests[-1].at == pytest.approx(50, rel=0.2)
    opened = scripts.traffic.Traffic(requests, output=1, concurrency=0)
    assert opened.may_start(0, running=400, now=requests[0].at)
    assert not opened.may_start(1, running=0, now=requests[0].at)
    closed = scripts.traffic.Traffic(requests, output=1, concurrency=7)
    assert closed.may_start(400, running=6, now=0.0)
    assert not closed.may_start(0, running=7, now=1e9)
    parts = closed.split(3)
    assert sorted(part.concurrency for part in parts) == [2, 2, 3]
    assert sorted(int(request.prompt) for part in parts for request in part.requests) == list(range(500))
    assert len(scripts.traffic.Traffic(requests, 1, 2).split(8)) == 2


@pytest.mark.e2e
def test_through_triton(scripts: SimpleNamespace, workdir: Path) -> None:
    traffic = ("--streams", "3", "--requests", "6", "--input", "5", "--output", "6", "--clients", "1")
    result = run(scripts.through_triton, workdir, "--num-adapters", "2", *traffic)
    for way in ("engine", "triton"):
        assert result[way]["tokens_per_s"] > 0
        assert result[way]["open_ttft"]["count"] == result[way]["closed_ttft"]["count"] == 6
    assert {"tritonserver", "stub", "engine"} <= result["triton"]["cores_used"].keys()
    assert "through Triton" in scripts.tables.render(result)


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


def test_percentiles_are_observed_values(scripts: SimpleNamespace) -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert [scripts.report.percentile(values, p) for p in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert scripts.report.percentile([7.0], 99) == 7.0


def test_vllm_stands_only_beside_its_own_setting(scripts: SimpleNamespace) -> None:
    setting = {**scripts.vllm_figures.SETTING, "max_loras": 0}
    assert scripts.vllm_figures.rate(setting, "16") == 7441
    assert scripts.vllm_figures.rate({**setting, "max_loras": 4}, "4") == 10_829
    assert scripts.vllm_figures.rate(setting, "0") is None
    assert scripts.vllm_figures.rate({**setting, "input": 2048}, "16") is None


def test_the_document_holds_the_committed_results(scripts: SimpleNamespace) -> None:
    text = (ROOT / "docs/performance.md").read_text()
    assert text == scripts.tables.fill(text), "run `python benchmarks/tables.py`"
    shown = {match["name"] for match in scripts.tables.BLOCK.finditer(text)}
    assert {path.stem for path in (BENCHMARKS / "results").glob("*.json")} <= shown


def test_plots(scripts: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    common = {"environment": {"device": "a GPU"}, "options": {**scripts.vllm_figures.SETTING, "max_loras": 0}}
    gap = {"p50_ms": 4.0, "p99_ms": 5.0}
    rows = [{"batch": batch, "adapters": n, "inter_token": gap} for batch in (1, 8) for n in sorted({0, 1, batch})]
    results = {"engine": {"best": {"off": 3.0, "0": 2.9, "16": 2.0, "mixed": 1.0}}, "latency": {"rows": rows}}
    (tmp_path / "results").mkdir()
    for name, figures in results.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps({**common, **figures}))
    assert scripts.plot.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path)]) == 0
    for name in ("throughput", "share", "latency"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_plots_say_what_they_need(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=re.escape("pip install matplotlib")):
        scripts.plot.pyplot()
