# SPDX-License-Identifier: Apache-2.0
"""Adapters that are unloaded, replaced, forgotten or refused while something speaks of them: the engine goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_models
from engine_bench import ANSWER_S, GREEDY, Driver
from multilora_backend.adapters.compositions import MAX_COMPOSITIONS
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import SamplingParams

ADAPTERS = {"a": {"r": 3}, "b": {"r": 4}, "c": {"r": 16}, "large": {"r": 40}, "broken": {"r": 3}}
PROMPT = [5, 6, 7]
ONE = SamplingParams(temperature=0.0, max_tokens=1)
READ_S = 0.1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_models.save_all(tmp_path_factory.mktemp("tiny"), ADAPTERS)
    tiny_models.break_adapter(root / "adapters/broken")
    return root


@pytest.fixture
def start(made: Path, tmp_path: Path) -> Callable[..., Driver]:
    shutil.copytree(made / "adapters", tmp_path / "adapters")
    (tmp_path / "tenants.yaml").write_text("tenants:\n  acme: {adapter_bytes: 100000000}\n")

    def start(ranks: int = 0, **settings) -> Driver:
        """`ranks`: what the device holds."""
        places = {"adapters": str(tmp_path / "adapters"), "adapter_roots": str(tmp_path)}
        if ranks:
            settings["adapter_device_bytes"] = ranks * Driver(made).engine.adapters.pool.bytes_per_rank
        return Driver(made, **places, **settings)

    return start


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of an adapter before it is asked for, as of those that are not on this machine."""
    monkeypatch.setattr(AdapterManager, "check_all", lambda self, wait_s=0.0: None)


@pytest.mark.parametrize("way", ["unloaded", "replaced", "part unloaded"])
def test_a_tenant_with_a_cap_outlives_its_adapters(start: Callable[..., Driver], tmp_path: Path, way: str):
    driver = start(tenants=str(tmp_path / "tenants.yaml"))
    adapters = driver.engine.adapters
    adapters.load("x", str(tmp_path / "adapters/a"))
    driver.submit(1, PROMPT, GREEDY, "x:0.5,b:0.5" if way == "part unloaded" else "x", tenant="acme")
    key = next(sequence.adapter for sequence in driver.engine.scheduler.waiting.values())
    driver.run()
    if way == "replaced":
        adapters.load("x", str(tmp_path / "adapters/b"))
    else:
        adapters.unload("x")
    driver.until(lambda: key not in adapters.records)
    driver.submit(2, PROMPT, GREEDY, "c", tenant="acme")
    driver.run()
    assert driver.tokens.keys() == {(1, 0), (2, 0)}
    assert not driver.failed


def test_a_tenant_with_a_cap_may_ask_for_more_sums_than_are_remembered(start: Callable[..., Driver], tmp_path: Path):
    driver = start(ranks=16 * MAX_COMPOSITIONS, tenants=str(tmp_path / "tenants.yaml"))
    for number in range(MAX_COMPOSITIONS + 3):
        driver.submit(number, PROMPT, ONE, f"a:0.{number + 1:03},b:0.5", tenant="acme")
        driver.run()
    assert len(driver.reasons) == MAX_COMPOSITIONS + 3
    assert not driver.failed


@pytest.mark.usefixtures("unchecked")
def test_an_adapter_too_large_that_was_read_as_a_part_is_refused_and_nobody_waits_for_it(start: Callable[..., Driver]):
    driver = start(ranks=16, max_overtake_s=0.01)
    driver.submit(1, PROMPT, GREEDY, "large:0.5,a:0.5")
    driver.run()
    driver.submit(2, PROMPT, GREEDY, "large")
    time.sleep(0.02)  # by now it is overdue, and comes before what came later
    for number, name in enumerate(("b", "a"), start=3):
        driver.submit(number, PROMPT, GREEDY, name)
    driver.run()
    assert "rank 43" in driver.failed[1].message
    assert "rank 40" in driver.failed[2].message
    assert driver.reasons.keys() == {(3, 0), (4, 0)}


@pytest.mark.parametrize("by_a_client", [False, True])
def test_what_fails_for_want_of_room_may_fail_to_be_read_as_well(start: Callable[..., Driver], by_a_client: bool):
    driver = start(ranks=16)
    adapters = driver.engine.adapters
    adapters.pin("c")
    driver.until(lambda: adapters.records["c"].state is AdapterState.ACTIVE)
    driver.until(lambda: adapters.records["broken"].rank == 3)
    driver.read_slowly(lambda folder: READ_S * (folder.name == "broken"))
    if by_a_client:
        adapters.prefetch("broken")
        driver.submit(1, PROMPT, GREEDY, "broken")
    else:
        adapters.preload("broken")
    driver.until(lambda: "NaN" in adapters.records["broken"].reason)
    if by_a_client:
        assert "pinned adapters leave 0 of adapter_device_bytes" in driver.failed[1].message
    adapters.unpin("c")
    driver.submit(2, PROMPT, GREEDY, "a")
    driver.run()
    assert driver.reasons.keys() == {(2, 0)}
    counted = adapters.stats().by_state
    assert {state for state, count in counted.items() if count < 0} == set()
    assert sum(counted.values()) == len(adapters.records)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("asked", ["a:0.5,broken:0.5", "a"])
def test_what_was_unloaded_is_gone_with_its_last_request_also_within_a_poll(start: Callable[..., Driver], asked: str):
    """In the same poll it is told that the adapter was looked at, and that what its only request waits for failed."""
    driver = start(ranks=16)
    adapters = driver.engine.adapters
    adapters.pin("c")
    driver.until(lambda: adapters.records["c"].state is AdapterState.ACTIVE)
    driver.read_slowly(lambda folder: READ_S * (folder.name in ("a", "broken")))
    driver.submit(1, PROMPT, GREEDY, asked)
    driver.step()
    adapters.unload("a")
    driver.until(lambda: 1 in driver.failed)
    assert ("NaN" if "broken" in asked else "pinned adapters leave 0") in driver.failed[1].message
    assert "a" not in adapters.records
    adapters.unpin("c")
    driver.submit(2, PROMPT, GREEDY, "b")
    driver.run()
    assert driver.reasons.keys() == {(2, 0)}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_sum_does_not_wait_for_the_room_of_its_own_part(start: Callable[..., Driver], tmp_path: Path, in_place: bool):
    """A replaced part is kept on the device for those that run with it, but a sum is made of what its source holds."""
    driver = start(ranks=24, adapter_host_bytes=1000)
    adapters, folder = driver.engine.adapters, tmp_path / "source"
    shutil.copytree(tmp_path / "adapters/c", folder)
    adapters.load("x", str(folder))
    driver.submit(1, PROMPT, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), "x")
    driver.until(lambda: len(driver.tokens.get((1, 0), ())) > 3)
    driver.submit(2, PROMPT, GREEDY, "x:0.5,b:0.5")
    driver.step()
    if in_place:
        folder.rename(tmp_path / "former")
        shutil.copytree(tmp_path / "adapters/a", folder)
    adapters.load("x", str(folder if in_place else tmp_path / "adapters/a"))
    driver.until(lambda: adapters.revisions.current["x"].key == "x@2")
    assert (1, 0) not in driver.reasons, "it was to be replaced while it runs"
    driver.run()
    driver.submit(3, PROMPT, GREEDY, "a:0.5,b:0.5" if in_place else "c:0.5,b:0.5")
    driver.run()
    assert driver.reasons.keys() == {(1, 0), (2, 0), (3, 0)}
    assert driver.tokens[2, 0] == driver.tokens[3, 0]


@pytest.mark.usefixtures("unchecked")
def test_a_replaced_part_that_fails_is_gone_with_the_sum_that_fails_of_it(start: Callable[..., Driver], tmp_path: Path):
    """In the same poll its holders would go on with the successor, but the sum was the last of them."""
    driver = start()
    adapters = driver.engine.adapters
    adapters.load("x", str(tmp_path / "adapters/broken"))
    driver.read_slowly(lambda folder: READ_S)
    driver.submit(1, PROMPT, GREEDY, "x:0.5,b:0.5")
    driver.step()
    adapters.load("x", str(tmp_path / "adapters/a"))
    driver.wait_until_read()  # now one poll hears of both
    driver.until(lambda: 1 in driver.failed)
    assert "NaN" in driver.failed[1].message
    assert "x" not in adapters.records
    driver.submit(2, PROMPT, GREEDY, "x:0.5,b:0.5")
    driver.run()
    assert driver.reasons.keys() == {(2, 0)}


@pytest.mark.usefixtures("unchecked")
def test_so_is_one_that_was_unloaded_and_fails_after_the_sum(start: Callable[..., Driver]):
    driver = start(adapter_load_threads=2)
    adapters = driver.engine.adapters
    begun = threading.Event()

    def pause(folder: Path) -> float:
        first = not begun.is_set()
        begun.set()
        return READ_S if first else 2 * READ_S

    driver.read_slowly(pause)
    driver.submit(1, PROMPT, GREEDY, "broken:0.5")
    driver.step()
    assert begun.wait(ANSWER_S), "the sum's reading is the first to end"
    adapters.prefetch("broken")
    adapters.unload("broken")
    driver.wait_until_read()  # now one poll hears of both
    driver.until(lambda: 1 in driver.failed)
    assert "NaN" in driver.failed[1].message
    driver.until(lambda: "broken" not in adapters.records)
