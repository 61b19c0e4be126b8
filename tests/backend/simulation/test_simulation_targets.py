# SPDX-License-Identifier: Apache-2.0
"""Figures and verdicts: computed from what happened, and nothing passes that did not run."""

from __future__ import annotations

import math
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def backlog(sim: SimpleNamespace, shares: list[tuple[int, int]], waiting: list[tuple[int, int]]) -> Any:
    """A recorder of tenants a and b: tokens in each step, and how many requests wait in it. A sample a step."""
    recorder = sim.record.Recorder()
    requests = {name: sim.workloads.Request(0.0, "", 1, 1000, name) for name in "ab"}
    records = {name: recorder.submitted(request) for name, request in requests.items()}
    for step, (tokens, queued) in enumerate(zip(shares, waiting, strict=True)):
        for name, count, length in zip("ab", tokens, queued, strict=True):
            recorder.services[name].waiting = length
            for _ in range(count):
                recorder.token(records[name], float(step))
        recorder.after_step(float(step))
    return recorder


def test_the_difference_is_that_of_spans_in_which_both_were_backlogged(sim: SimpleNamespace):
    difference = sim.record.service_difference
    always = [(1, 1)] * 6
    # The first token brings its prompt's service of 1 with it, on both sides.
    assert difference(backlog(sim, [(1, 1)] * 6, always), "a", "b") == 0
    assert difference(backlog(sim, [(1, 1), (2, 1), (2, 1), (2, 1), (1, 1), (1, 1)], always), "a", "b") == 6
    # A lead that is made up for counts in full: it was a span of its own.
    assert difference(backlog(sim, [(1, 1), (3, 1), (3, 1), (1, 3), (1, 3), (1, 3)], always), "a", "b") == 12
    apart = [(1, 1), (1, 1), (0, 1), (0, 1), (1, 1), (1, 1)]
    assert difference(backlog(sim, [(1, 1), (1, 1), (0, 9), (0, 9), (1, 1), (1, 1)], apart), "a", "b") == 0
    assert difference(backlog(sim, [(1, 1), (2, 1), (0, 9), (0, 9), (1, 1), (1, 1)], apart), "a", "b") == 2
    weighted = difference(backlog(sim, [(2, 1)] * 6, always), "a", "b", {"a": 2.0})
    assert weighted < difference(backlog(sim, [(2, 1)] * 6, always), "a", "b")


def test_a_tenant_that_ran_dry_between_two_samples_was_not_backlogged(sim: SimpleNamespace):
    recorder = sim.record.Recorder()
    record = recorder.submitted(sim.workloads.Request(0.0, "", 1, 9, "a"))
    recorder.after_step(0.0)
    recorder.started(record, 0.01)
    recorder.after_step(0.02)
    recorder.submitted(sim.workloads.Request(0.03, "", 1, 9, "a"))
    recorder.after_step(0.2)
    recorder.after_step(0.4)
    assert recorder.services["a"].always_backlogged == [True, False, True]


def test_a_tenant_that_comes_late_has_had_nothing_before(sim: SimpleNamespace):
    recorder = sim.record.Recorder()
    first = recorder.submitted(sim.workloads.Request(0.0, "", 5, 9, "a"))
    for now in (0.0, 0.2):
        recorder.token(first, now)
        recorder.after_step(now)
    late = recorder.submitted(sim.workloads.Request(0.3, "", 1, 9, "b"))
    assert recorder.services["b"].totals == [0.0, 0.0]
    recorder.token(late, 0.4)
    recorder.after_step(0.4)
    assert recorder.services["a"].totals == [7.0, 9.0, 9.0]
    assert recorder.services["b"].totals == [0.0, 0.0, 3.0]
    assert recorder.services["b"].always_backlogged == [False, False, False]
    assert sim.record.service_difference(recorder, "a", "b") == 0


def test_requests_that_never_started_have_waited_until_the_end(sim: SimpleNamespace):
    requests = [sim.workloads.Request(0.0, "", 10, 400), sim.workloads.Request(0.5, "", 10, 400)]
    setup = sim.simulator.Setup({}, 1, settings={"max_num_seqs": 1}, until=1.0)
    figures = sim.summary.summarise(sim.simulator.simulate(requests, setup))
    assert figures["wait_s"]["max"] == pytest.approx(0.5, abs=0.02)
    assert figures["ttft_s"]["max"] == pytest.approx(0.5, abs=0.02)
    assert (figures["requests"], figures["finished"], figures["goodput"]) == (2, 0, 0)


def test_goodput_counts_first_tokens_in_time_over_the_time_in_which_requests_came(sim: SimpleNamespace):
    recorder = sim.record.Recorder()
    # Came, began, first token, end: in time, begun in time only, in time but never done, in time at the very limit.
    for at, *times in ((0.0, 1, 2, 3), (1.0, 2, 8, 9), (2.0, 3, 4, math.inf), (10.0, 11, 16, 99)):
        record = recorder.submitted(sim.workloads.Request(at, "", 1, 1))
        record.started, record.first, record.last = times
    setup = sim.simulator.Setup({}, 1)
    figures = sim.summary.summarise(sim.simulator.Run(setup, recorder, 100.0, 0, 0, 0, 0, [], {}, 0.0))
    assert figures["goodput"] == pytest.approx(2 / 10)
    assert figures["attainment"] == pytest.approx(2 / 4)


def adapters(*waits: float) -> dict[str, Any]:
    shown = [{"adapter": f"a{i}", "wait_s": {"p99": wait}} for i, wait in enumerate(waits)]
    return {"adapters": shown, "requests": 10, "finished": 10}


def test_starvation_is_the_worst_over_the_median(sim: SimpleNamespace):
    assert sim.targets.worst_and_median(adapters(3.0, 1.0, 2.0)) == (3.0, 2.0)
    assert sim.targets.worst_and_median(adapters(4.0, 1.0, 2.0, 3.0)) == (4.0, 2.0)
    runs = {"6 on 3 slots": {"multilora": adapters(2.0, 2.0, 3.1), "first-come": adapters(1.0, 1.0, 1.0)}}
    ratio, lost = sim.targets.evaluate(runs)
    assert (ratio.value, ratio.held, lost.held) == (1.55, False, True)
    runs["6 on 3 slots"]["multilora"] |= {"finished": 9, "adapters": adapters(2.0, 2.0, 3.0)["adapters"]}
    ratio, lost = sim.targets.evaluate(runs)
    assert (ratio.held, lost.value, lost.held) == (True, 1, False)


def vtc(difference: float, rate: float) -> dict[str, Any]:
    return {"difference": difference, "tokens_per_s": rate, "longest_prompt": 256, "longest_request": 512}


def test_fairness_is_held_to_vtc_s_bound(sim: SimpleNamespace):
    bound = 2 * 2 * 256 * 512
    assert sim.targets.vtc_bound(vtc(0, 0), 256, 10**9) == bound
    assert sim.targets.vtc_bound(vtc(0, 0), 256, 1000) == 2 * 2 * 1000
    assert sim.targets.vtc_bound(vtc(0, 0) | {"longest_prompt": 9000}, 256, 1000) == 2 * 9000
    for difference, rate, held in ((bound, 97.0, [True, True]), (bound + 1, 96.9, [False, False])):
        runs = {"vtc overload": {"multilora": vtc(difference, rate), "first-come": vtc(1e9, 100.0)}}
        assert [target.held for target in sim.targets.evaluate(runs)] == held


def test_goodput_is_each_scheduler_s_best(sim: SimpleNamespace):
    rates = {"1000 uniform 10/s": (10.0, 9.0), "1000 uniform 20/s": (20.0, 3.0), "1000 uniform 30/s": (1.0, 0.0)}
    runs = {c: {"multilora": {"goodput": a}, "first-come": {"goodput": b}} for c, (a, b) in rates.items()}
    (target,) = sim.targets.evaluate(runs)
    assert target.value == pytest.approx(20 / 9)
    assert target.held


def test_the_step_loop_counts_by_its_quickest_run(sim: SimpleNamespace):
    def run(median: float, steps: int = 9) -> dict[str, Any]:
        return {"multilora": {"full_host_ms": {"p50": median, "p90": 3.0, "p99": 4.0}, "full_steps": steps}}

    medians = {"run 1": run(1.5), "run 2": run(0.7), "run 3": run(0.1, steps=0)}
    [target] = sim.targets.step_loop({f"512 running of 10000, {name}": each for name, each in medians.items()})
    assert (target.value, target.held) == (0.7, True)
    assert target.beside.endswith("of 9 steps with a full batch; medians of all runs 1.50, 0.70, inf ms")


def test_a_cost_that_was_not_measured_is_no_pass(sim: SimpleNamespace):
    host = {"p50": 0.0, "p90": 0.0, "p99": 0.0}
    runs = {"512 running of 10000": {"multilora": {"full_host_ms": host, "full_steps": 0}}}
    (target,) = sim.targets.evaluate(runs)
    assert target.value == math.inf
    assert not target.held


def test_nothing_that_was_not_run_is_judged(sim: SimpleNamespace):
    assert sim.targets.evaluate({}) == []


def test_the_script_writes_what_the_document_reads(
    sim: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    fitted = {"run": "a run", "figure": "ms", "measured": 2.0, "simulated": 3.0, "commit": "abc1234"}
    monkeypatch.setattr(sim.simulate_script, "calibrate", lambda: [fitted])
    status = sim.simulate_script.main(
        ["--only", "vtc", "--scale", "0.005", "--processes", "1", "--json", str(tmp_path)]
    )
    assert str(tmp_path) not in (tmp_path / "vtc.json").read_text()
    out = capsys.readouterr().out
    assert "vtc overload, first-come" in out
    assert ("FAIL" in out) == bool(status)
    assert ("0 missed" in out) == (not status)
    blocks = ("vtc", "targets", "slots", "fit")
    (tmp_path / "scheduling.md").write_text(
        "".join(f"<!-- simulated: {name} -->\nof before\n<!-- /simulated -->\n" for name in blocks)
    )
    assert sim.simulated_script.main(["--results", str(tmp_path), "--docs", str(tmp_path), "--no-plots"]) == 0
    text = (tmp_path / "scheduling.md").read_text()
    assert "| vtc overload | multilora |" in text
    assert "largest service difference" in text
    assert "| a run | ms | 2.00 | abc1234 | 3.00 | 1.500 |" in text
    assert ("**missed**" in text) == bool(status)
    assert "of before" not in text
    assert "Not simulated." in text
    with pytest.raises(SystemExit):
        sim.simulate_script.main(["--only", "nope"])


@pytest.mark.parametrize("value", [1.0, 3.0])
def test_a_missed_target_is_said_everywhere(
    sim: SimpleNamespace, value: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    target = sim.targets.Target("a figure", value, 2.0, at_most=True)
    for module in (sim.simulate_script, sim.tables):
        monkeypatch.setattr(module, "evaluate", lambda runs: [target])
    monkeypatch.setattr(sim.simulate_script, "calibrate", lambda: [])
    monkeypatch.setattr(sim.simulate_script, "_play", lambda *arguments: iter(()))
    missed = value > 2
    assert sim.simulate_script.main([]) == missed
    assert ("FAIL" in capsys.readouterr().out) == missed
    assert ("**missed**" in sim.tables.targets({})) == missed


class Inline:
    """Stands in for a pool of processes."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result((*work(*arguments)[:2], {"processes": self.processes}))
        return future


def test_scenarios_about_the_host_s_time_are_played_alone_and_last(
    sim: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sim.simulate_script, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(sim.simulate_script, "play", lambda name, index, scheduler, scale: (name, scheduler, {}))
    played = list(sim.simulate_script._play(["loop", "punica", "platform", "vtc"], 1.0, 2))
    assert [name for name, _ in played] == ["punica", "vtc", "platform", "loop"]
    assert [cases[name]["multilora"]["processes"] for name, cases in played] == [2, 2, 1, 1]
    assert all(set(cases[name]) == {"multilora", "first-come"} for name, cases in played)


def test_the_document_holds_the_committed_results(sim: SimpleNamespace):
    text = (ROOT / "docs/scheduling.md").read_text()
    results = sim.tables.read(sim.simulated_script.RESULTS)
    assert text == sim.tables.fill(text, results), "run `python benchmarks/simulated.py`"
    shown = {match["name"] for match in sim.tables.BLOCK.finditer(text)}
    assert set(results) <= shown


def test_committed_results_stay_small(sim: SimpleNamespace):
    files = list(sim.simulated_script.RESULTS.glob("*.json"))
    assert {path.stem for path in files} == {*sim.scenarios.SCENARIOS, "fit"}
    assert sum(path.stat().st_size for path in files) < 400_000
    assert sum(len(path.read_text().splitlines()) for path in files) < 5_000


def test_plots(sim: SimpleNamespace, tmp_path: Path):
    pytest.importorskip("matplotlib")
    results = sim.tables.read(sim.simulated_script.RESULTS)
    for name in sim.plots.draw(results, tmp_path):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
