# SPDX-License-Identifier: Apache-2.0
"""What the benchmark scripts make of their measurements: arithmetic, tables, plots, and the document's own figures."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmark_scripts import BENCHMARKS, ROOT, benchmark_scripts


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with benchmark_scripts() as modules:
        yield modules


def test_gaps_count_from_the_moment_asked_for(scripts: SimpleNamespace) -> None:
    timing = scripts.workload.Timing(1.0, [3.0, 4.0, 6.0, 9.0])
    assert timing.ttft == 2.0
    assert timing.gaps() == [1.0, 2.0, 3.0]
    assert timing.gaps(since=4.0) == [2.0, 3.0]


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


def test_the_readme_has_the_same_figures(scripts: SimpleNamespace) -> None:
    result = json.loads((BENCHMARKS / "results/engine.json").read_text())
    ours, theirs = result["best"], scripts.vllm_figures.MAX_LORAS_64

    def shares(rates: dict[str, float]) -> str:
        *first, last = (f"{100 * rates[mix] / rates['off']:.0f}" for mix in ("1", "4", "16", "64"))
        return f"{', '.join(first)} and {last}%"

    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{ours['off']:,.0f} output tokens/s with LoRA off" in text
    assert f"adapters in the batch {shares(ours)} of that" in text
    assert f"keeps {shares(theirs)} of {theirs['off']:,.0f} ({result['environment']['date']};" in text


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
