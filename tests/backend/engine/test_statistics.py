# SPDX-License-Identifier: Apache-2.0
"""What the engine tells of itself: only what has changed, and all of it to whoever is new."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams, Sequence, Slot, StepPlan
from multilora_backend.engine.engine import Engine
from multilora_backend.engine.statistics import Place, Statistics, changes
from multilora_backend.protocol import Failed, Stats, Submit

PLACES = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.sampled_from(["device", "host"]), st.integers(1, 64), st.booleans())
)


@given(st.lists(PLACES, max_size=6))
def test_whoever_hears_all_changes_knows_all(history: list[dict[str, Place]]) -> None:
    before: dict[str, Place] = {}
    heard: dict[str, Place] = {}
    for now in history:
        told = changes(before, now)
        assert len(told) == sum(before.get(key) != now.get(key) for key in before.keys() | now.keys())
        for resident in told:
            if resident.level:
                heard[resident.key] = resident.level, resident.rank, resident.pinned
            else:
                del heard[resident.key]
        assert heard == now
        before = now


@dataclass
class ActiveSince:
    """An adapter manager, for its clock."""

    since: dict[str, float]

    def active_since(self, key: str) -> float:
        return self.since[key]


def slot(adapter: str, arrival: float, started: float | None) -> Slot:
    sequence = Sequence(("front", 1, 0), 1, [1], SamplingParams(), 0, adapter=adapter, arrival=arrival)
    sequence.started = started
    return Slot(sequence, 0, 1, True)


def test_only_who_came_before_its_adapter_waited_for_it() -> None:
    statistics = Statistics(ActiveSince({"late": 7.0, "early": 1.0}))
    slots = (
        slot("late", arrival=5.0, started=9.0),
        slot("late", arrival=8.0, started=9.0),
        slot("early", arrival=2.0, started=9.0),
        slot("", arrival=2.0, started=9.0),
        slot("late", arrival=6.0, started=8.0),  # counted when it started
    )
    statistics.launched(StepPlan(slots), now=9.0)
    assert statistics.adapter_waits == [2.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_models.save_llama(root / "model")
    for seed, (name, rank) in enumerate({"a": 8, "b": 16, "c": 3}.items()):
        tiny_models.save_adapter(root / "model", root / "adapters" / name, seed, r=rank)
    return root


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    """With room for three pages of 8 ranks on the device."""
    per_rank = 2 * 4 * (3 * 32 + 64 + 32 + 32 + 2 * 32 + 96 + 48 + 32)
    folders = {"model": str(folder / "model"), "adapters": str(folder / "adapters"), "device": "cpu"}
    room = {**tiny_models.ROOM, "adapter_device_bytes": 24 * per_rank}
    made = Engine(Config(**folders, **room, block_size=4), wake=lambda: None)
    yield made
    made.close()


def serve(engine: Engine, *adapters: str) -> None:
    for number, adapter in enumerate(adapters):
        engine.submit("front", Submit(number, [3, 4, 5], SamplingParams(max_tokens=3, ignore_eos=True), adapter))
    deadline = time.monotonic() + 30
    while not engine.idle:
        assert time.monotonic() < deadline
        if not engine.step():
            time.sleep(0.001)
    assert not any(isinstance(reply, Failed) for reply in engine.take_replies().get("front", ()))


def where(stats: Stats) -> dict[str, tuple[str, int]]:
    return {resident.key: (resident.level, resident.rank) for resident in stats.residents}


def test_hits_waits_and_residency_of_a_running_engine(engine: Engine) -> None:
    start = engine.stats()
    assert (start.residents, start.residents_complete) == ([], True)
    assert (start.block_size, start.num_kv_pages) == (4, engine.pages.num_pages - 1)

    serve(engine, "a", "a", "b", "")
    first = engine.stats()
    assert not first.residents_complete
    assert where(first) == {"a": ("device", 8), "b": ("device", 16)}
    assert first.adapter_arrivals == {"device": 0, "host": 0, "disk": 3}
    assert len(first.adapter_wait_seconds) == 3, "one without an adapter waits for none"
    assert all(0 < seconds < 30 for seconds in first.adapter_wait_seconds)
    assert first.max_resident == 2
    taken, budget = first.adapter_bytes["device"]
    assert taken == budget == engine.adapters.pool.num_ranks * engine.adapters.pool.bytes_per_rank

    serve(engine, "c", "b")
    second = engine.stats()
    assert where(second) == {"a": ("host", 8), "c": ("device", 3)}, "what has not changed is not told again"
    assert second.adapter_arrivals == {"device": 1, "host": 0, "disk": 4}
    assert second.max_resident == 24 * 2 // (16 + 8)
    assert len(second.adapter_wait_seconds) == 1

    serve(engine, "a")
    assert engine.stats().adapter_arrivals == {"device": 1, "host": 1, "disk": 4}
    assert engine.stats().residents == []
    engine.statistics.start_over()
    again = engine.stats()
    assert again.residents_complete
    assert set(where(again)) == {"a", "b", "c"}


def test_what_waits_for_its_adapter_is_counted_and_named(engine: Engine) -> None:
    for number in range(3):
        engine.submit("front", Submit(number, [3, 4, 5], SamplingParams(max_tokens=3), "a"))
    engine.submit("front", Submit(9, [3, 4, 5], SamplingParams(max_tokens=3), ""))
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_waiting_adapter) == (4, 3)
    assert stats.waiting_adapters == ["a"]
    assert stats.running_adapters == []
    serve(engine)
    assert (engine.stats().num_waiting, engine.stats().num_waiting_adapter) == (0, 0)


def test_what_runs_is_named(engine: Engine) -> None:
    serve(engine, "a")
    engine.submit("front", Submit(1, [3, 4, 5], SamplingParams(max_tokens=9, ignore_eos=True), "a"))
    engine.submit("front", Submit(2, [3, 4, 5], SamplingParams(max_tokens=9, ignore_eos=True), ""))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.running_adapters, stats.waiting_adapters) == (2, ["a"], [])
    serve(engine)
    assert engine.stats().running_adapters == []
