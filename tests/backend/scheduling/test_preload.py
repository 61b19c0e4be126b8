# SPDX-License-Identifier: Apache-2.0
"""Loads before anybody asks: rates, what they lead to, and that nothing is evicted that is about to run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.core import FinishReason
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.scheduling.arrivals import HOT, TIME_CONSTANT_S, Arrivals
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.preload import Preload, Prospect, plan_preload
from multilora_backend.scheduling.tenants import Tenants
from virtual_scheduler import FakeAdapters, Traffic, add, make


def test_a_steady_rate_is_found_and_forgotten():
    arrivals = Arrivals()
    for i in range(2000):
        arrivals.add("a", i * 0.25)
    assert arrivals.rate("a", 500.0) == pytest.approx(4.0, rel=0.02)
    assert arrivals.rate("a", 500.0 + TIME_CONSTANT_S) == pytest.approx(4.0 / math.e, rel=0.02)
    assert arrivals.rate("b", 500.0) == 0


def test_days_change_nothing():
    arrivals = Arrivals()
    for day in range(4):
        for i in range(400):
            arrivals.add("a", day * 86400 + i * 0.25)
    assert arrivals.rate("a", 3 * 86400 + 100) == pytest.approx(4.0, rel=0.1)
    arrivals.add("late", 9e9)
    assert set(arrivals.scores) == {"late"}
    assert all(math.isfinite(score) for score in arrivals.scores.values())


@given(st.lists(st.integers(0, 200), max_size=400))
def test_the_hot_ones_are_those_with_the_highest_rates(keys: list[int]):
    arrivals = Arrivals()
    for i, key in enumerate(keys):
        arrivals.add(str(key), i * 0.1)
    assert len(arrivals.hot) == min(HOT, len(set(keys)))
    rest = [arrivals.score(key) for key in arrivals.scores if key not in arrivals.hot]
    assert max(rest, default=0) <= min((arrivals.score(key) for key in arrivals.hot), default=0)


@pytest.mark.parametrize(
    ("rate", "cost", "plan"),
    [
        (1.0, 0.0, None),
        (1.0, math.inf, None),
        (1.0, 0.002, Preload(True, frozenset({"waits", "hotter"}))),
        (0.05, 0.002, None),
        (0.05, 0.05, Preload(False)),
        (0.001, 0.05, None),
    ],
)
def test_what_a_rate_leads_to(rate: float, cost: float, plan: Preload | None):
    scores = {"it": 5.0, "hotter": 6.0, "colder": 1.0, "waits": 0.0}
    assert plan_preload(Prospect("it", rate, cost), ["hotter", "colder", "waits"], {"waits": 1}, scores) == plan


def serve(traffic: Traffic, adapter: str, seconds: float) -> None:
    end = traffic.now + seconds
    while traffic.now < end:
        add(traffic.scheduler, adapter=adapter, arrival=traffic.now, max_len=6)
        traffic.step()


def test_a_busy_adapter_that_was_evicted_comes_back_before_it_is_asked_for():
    adapters = FakeAdapters(room=2)
    traffic = Traffic(make(adapters=adapters))
    serve(traffic, "busy", 5.0)
    adapters.active.clear()
    for _ in range(30):
        traffic.step()
    assert "busy" in adapters.active


def test_each_of_the_hot_ones_has_its_turn():
    adapters = FakeAdapters(room=4)
    traffic = Traffic(make(adapters=adapters))
    for adapter in ("one", "two", "three"):
        serve(traffic, adapter, 3.0)
    adapters.active.clear()
    for _ in range(60):
        traffic.step()
    assert sorted(adapters.active) == ["one", "three", "two"]


def test_nothing_is_loaded_on_a_guess_while_somebody_waits_unless_a_cap_makes_it_wait():
    adapters = FakeAdapters(room=4)
    tenants = Tenants.parse({"tenants": {"capped": {"max_running": 1}}})
    traffic = Traffic(make(adapters=adapters, seqs=2, num_pages=1000, tenants=tenants))
    serve(traffic, "hot", 3.0)
    for _ in range(2):
        add(traffic.scheduler, adapter="capped", arrival=traffic.now, tenant="capped", max_len=600)
    other = add(traffic.scheduler, adapter="runs", arrival=traffic.now, max_len=600)
    traffic.step()
    adapters.active.remove("hot")
    waits = add(traffic.scheduler, adapter="waits", arrival=traffic.now)
    for _ in range(30):
        traffic.step()
        assert "hot" not in adapters.active
    traffic.scheduler.finish(other, FinishReason.ABORT)
    for _ in range(30):
        traffic.step()
    assert waits.started is not None
    assert len(traffic.scheduler.waiting) == 1, "what the cap holds back"
    assert "hot" in adapters.active


def test_without_the_strategy_nothing_is_loaded_that_nobody_asked_for():
    adapters = FakeAdapters(room=2)
    traffic = Traffic(make(adapters=adapters, policy=Policy(preload=False)))
    serve(traffic, "busy", 5.0)
    adapters.active.clear()
    for _ in range(30):
        traffic.step()
    assert adapters.active == []


def test_a_rare_adapter_on_the_disk_is_brought_to_the_host():
    adapters = FakeAdapters(on_disk=["rare"])
    traffic = Traffic(make(adapters=adapters))
    traffic.scheduler._preloader.arrivals.add("rare", 0.0)
    for _ in range(30):
        traffic.scheduler._preloader.arrivals.add("rare", traffic.now)
        traffic.now += 20.0
        traffic.step()
    assert adapters.prefetched
    assert "rare" not in adapters.active


def test_what_waits_for_a_seat_is_loaded_ahead_but_not_over_what_waits_too():
    adapters = FakeAdapters(room=2)
    scheduler = make(adapters=adapters, seqs=1, policy=Policy(max_overtake_s=100.0))
    add(scheduler, adapter="runs", max_len=1000)
    Traffic(scheduler).step()
    add(scheduler, adapter="next", arrival=0.1)
    traffic = Traffic(scheduler)
    traffic.now = 0.2
    traffic.step()
    assert "next" in adapters.active, "there is no seat yet"
    add(scheduler, adapter="after", arrival=0.3)
    traffic.step()
    assert sorted(adapters.active) == ["next", "runs"]


def test_adapters_that_are_gone_are_forgotten():
    class Gone(FakeAdapters):
        def load_cost_s(self, key: str) -> float:
            raise MultiloraError(ErrorCode.INVALID_ARG, "unknown")

    traffic = Traffic(make(adapters=Gone()))
    traffic.scheduler._preloader.arrivals.add("gone", 0.0)
    traffic.step()
    assert not traffic.scheduler._preloader.arrivals.hot
