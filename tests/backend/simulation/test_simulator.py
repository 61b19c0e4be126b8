# SPDX-License-Identifier: Apache-2.0
"""Virtual time: what takes how long, on whom it has an effect, and that nothing is lost."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles import examples

MIB = 2**20
GIB = 2**30


def names(count: int, rank: int = 16) -> dict[str, int]:
    return {f"a{i}": rank for i in range(count)}


def test_one_request_takes_its_steps_and_its_load(sim: SimpleNamespace):
    """Cold: read, copied, one step for the prompt, one for each further token, none of which waits."""
    request = sim.workloads.Request(1.0, "a0", 100, 5)
    run = sim.simulator.simulate([request], sim.simulator.Setup(names(1), 1))
    (record,) = run.recorder.records
    model = sim.model.TimeModel.read()
    nbytes = 16 * sim.shapes_script.SHAPES["llama-3.1-8b"].bytes_per_rank
    load = model.read_s(nbytes, 1) + model.copy_s(nbytes)
    assert record.wait == pytest.approx(load, rel=1e-6)
    lora = model.lora_step_ms / 1e3 + 16 * model.lora_rank_us / 1e6
    prompt = model.rows_s(100) * (1 + model.lora_prompt_share) + lora + 100 * 50 * model.prompt_pair_ns / 1e9
    assert record.ttft == pytest.approx(load + prompt, rel=1e-6)
    decode = sum(model.rows_s(1) + lora + length * model.kv_token_ns / 1e9 for length in range(100, 104))
    assert record.last - record.first == pytest.approx(decode, rel=1e-6)
    assert (run.loads, run.reads, run.recorder.steps) == (1, 1, 5)


def gaps_around_a_load(sim: SimpleNamespace, first_come: bool) -> float:
    """The longest time between tokens of a request beside which another one's adapter is loaded, over the shortest."""
    requests = [sim.workloads.Request(0.0, "", 10, 100), sim.workloads.Request(0.2, "a0", 2, 2)]
    times: list[float] = []
    run: Any = sim.simulator
    token = sim.record.Recorder.token

    def spy(self: Any, record: Any, now: float) -> None:
        if not record.request.adapter:
            times.append(now)
        token(self, record, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim.record.Recorder, "token", spy)
        run.simulate(requests, run.Setup(names(1), 1, first_come=first_come))
    assert len(times) == 100
    return max(after - before for before, after in itertools.pairwise(times))


def test_a_load_is_hidden_from_those_that_run_but_not_in_the_baseline(sim: SimpleNamespace):
    model = sim.model.TimeModel.read()
    load = model.read_s(16 * sim.shapes_script.SHAPES["llama-3.1-8b"].bytes_per_rank, 1)
    assert gaps_around_a_load(sim, first_come=False) < 0.01
    assert gaps_around_a_load(sim, first_come=True) > load


def test_the_baseline_passes_by_those_without_a_slot_and_forgets_nobody(sim: SimpleNamespace):
    """One slot: a0's later request runs beside its first one, a1's in between waits for both."""
    asked = (("a0", 30), ("a1", 2), ("a0", 30), ("", 2), ("a1", 2))
    requests = [sim.workloads.Request(0.01 * i, name, 10, output) for i, (name, output) in enumerate(asked)]
    setup = sim.simulator.Setup(names(2), 2, settings={"max_loras": 1}, first_come=True)
    first, passed_by, second, base, last = sim.simulator.simulate(requests, setup).recorder.records
    assert second.started < first.last
    assert base.started < first.last
    assert passed_by.started >= max(first.last, second.last)
    assert last.started >= passed_by.started


def test_what_the_baseline_has_preempted_goes_on_before_later_ones(sim: SimpleNamespace):
    requests = [sim.workloads.Request(0.0, "", 40, 60), *(sim.workloads.Request(0.01, "", 40, 60) for _ in range(2))]
    setup = sim.simulator.Setup({}, 1, settings={"max_num_seqs": 2}, first_come=True)
    run = sim.simulator.simulate(requests, setup, replace(sim.model.TimeModel.read(), kv_tokens=160))
    first, preempted, later = run.recorder.records
    assert run.preemptions
    assert later.started >= first.last
    assert preempted.last < later.last


def test_what_is_in_the_host_cache_is_not_read_again(sim: SimpleNamespace):
    requests = [sim.workloads.Request(float(i), f"a{i % 2}", 10, 2) for i in range(6)]
    one = 16 * sim.shapes_script.SHAPES["llama-3.1-8b"].bytes_per_rank
    for first_come in (False, True):
        setup = sim.simulator.Setup(names(2), 1, host_bytes=3 * one, first_come=first_come)
        run = sim.simulator.simulate(requests, setup)
        assert (run.reads, run.loads >= 6) == (2, True)
        assert sum(run.arrivals.values()) == 6
        run = sim.simulator.simulate(requests, replace(setup, host_bytes=0))
        assert run.reads >= 6, "nothing is kept, so every load reads"


def test_a_simulation_that_cannot_go_on_says_so(sim: SimpleNamespace):
    with pytest.raises(RuntimeError, match="adapters failed"):
        sim.simulator.simulate([sim.workloads.Request(0.0, "a0", 4, 4)], sim.simulator.Setup(names(1, 64), 1))


def test_the_host_s_part_of_each_step_is_measured(sim: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """All that scheduler and manager do, by a clock of which each look takes 1: two looks a call."""
    ticks = itertools.count()
    monkeypatch.setattr(sim.simulator.time, "thread_time", lambda: float(next(ticks)))
    requests = [sim.workloads.Request(0.0, "", 10, 3), sim.workloads.Request(0.0, "", 10, 3)]
    recorder = sim.simulator.simulate(requests, sim.simulator.Setup({}, 1, settings={"max_num_seqs": 2})).recorder
    # Two adds, then poll and schedule in each turn, publish in each but the first, and two that finish in the last.
    assert recorder.steps == 3
    assert recorder.host_s == [4, 3, 3, 5]
    assert recorder.full_host_s == [4, 3, 3]


def test_a_simulation_stops_when_it_is_told_to(sim: SimpleNamespace):
    requests = [sim.workloads.Request(0.1 * i, "", 50, 50) for i in range(100)]
    run = sim.simulator.simulate(requests, sim.simulator.Setup({}, 1, until=2.0))
    assert run.seconds == pytest.approx(2.0, abs=0.1)
    assert len(run.recorder.records) < 30


def figures(sim: SimpleNamespace, run: Any) -> dict[str, Any]:
    found = sim.summary.summarise(run)
    for measured in ("host_ms", "full_host_ms", "cpu_s"):
        del found[measured]
    return found


@examples(8)
@given(data=st.data())
def test_every_request_ends_with_all_its_tokens_on_both_schedulers(sim: SimpleNamespace, data: st.DataObject):
    adapters = data.draw(st.integers(1, 6))
    requests = sorted(
        (
            sim.workloads.Request(
                data.draw(st.floats(0, 3)),
                data.draw(st.sampled_from(["", *names(adapters)])),
                data.draw(st.integers(1, 300)),
                data.draw(st.integers(1, 60)),
                data.draw(st.sampled_from(["", "x", "y"])),
            )
            for _ in range(data.draw(st.integers(1, 25)))
        ),
        key=lambda r: r.at,
    )
    setup = sim.simulator.Setup(
        names(adapters),
        data.draw(st.integers(1, 3)),
        host_bytes=data.draw(st.sampled_from([0, 200 * MIB, GIB])),
        settings={
            "max_num_seqs": data.draw(st.integers(1, 8)),
            "max_num_batched_tokens": data.draw(st.sampled_from([16, 128, 2048])),
            "max_loras": data.draw(st.integers(0, 2)),
        },
        first_come=data.draw(st.booleans()),
    )
    model = replace(sim.model.TimeModel.read(), kv_tokens=data.draw(st.sampled_from([400, 1000, 100_000])))
    run = sim.simulator.simulate(requests, setup, model)
    assert [record.tokens for record in run.recorder.records] == [r.output for r in requests]
    for record in run.recorder.records:
        assert record.request.at <= record.started <= record.first <= record.last
    service = sum(r.prompt + 2 * r.output for r in requests)
    assert sum(s.total for s in run.recorder.services.values()) == service
    assert not any(s.waiting for s in run.recorder.services.values())
    again = sim.simulator.simulate(requests, setup, model)
    assert figures(sim, run) == figures(sim, again), "nothing but the host's own time may differ"
