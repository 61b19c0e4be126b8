# SPDX-License-Identifier: Apache-2.0
"""Replaced revisions whose only copy is on the device: who has begun with one ends with it, and nobody starves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tiny_models
from engine_bench import Driver
from multilora_backend.core import SamplingParams, SequenceStatus

ADAPTERS = {"old": {"r": 20}, "small": {"r": 3}, "wide": {"r": 18}, "narrow": {"r": 8}}
PROMPT = [5, 6, 7]
LONG = 100


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_all(tmp_path_factory.mktemp("tiny"), ADAPTERS)


@pytest.fixture(scope="module")
def alone(made: Path) -> list[int]:
    return tiny_models.greedy(made / "model", made / "adapters" / "old", PROMPT, LONG)


@pytest.fixture
def start(made: Path, tmp_path: Path):
    """An engine with room for so many ranks, whose host keeps nothing."""
    shutil.copytree(made / "adapters", tmp_path / "adapters")
    drivers = []

    def start(ranks: int, **settings) -> Driver:
        probe = Driver(made)
        per_rank = probe.engine.adapters.pool.bytes_per_rank
        probe.engine.close()
        places = {"adapters": str(tmp_path / "adapters"), "adapters_watch_s": 0.0}
        sizes = {"adapter_host_bytes": 0, "adapter_device_bytes": ranks * per_rank}
        drivers.append(Driver(made, **places, **sizes, tenure_s=0.001, max_overtake_s=0.0, **settings))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.engine.close()


def submit(driver: Driver, request_id: int, name: str, tokens: int = 3) -> None:
    driver.submit(request_id, PROMPT, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True), name)


def retire(driver: Driver, name: str) -> None:
    """Its source has another content from now on, so nobody can read it again."""
    adapters = driver.engine.adapters
    folder = Path(driver.engine.config.adapters)
    shutil.rmtree(folder / name)
    shutil.copytree(folder / "small", folder / name)
    adapters.unload(name)
    adapters.load(name)
    assert adapters.records[name].retired
    assert name in adapters.resident()
    assert not adapters.in_host(name)


def test_replaced_before_it_is_turned_out(start, alone):
    driver = start(24)
    submit(driver, 0, "old", LONG)
    driver.until(lambda: len(driver.tokens.get((0, 0), [])) > 3)
    retire(driver, "old")
    for request_id, name in enumerate(("small", "wide", "narrow", "old"), 1):
        submit(driver, request_id, name)
    driver.run()
    assert driver.engine.scheduler.pauses > 0
    assert not driver.failed
    assert driver.tokens[0, 0] == alone
    assert len(driver.reasons) == 5


def test_replaced_while_it_is_paused(start, alone):
    driver = start(32, max_loras=1)
    submit(driver, 0, "old", LONG)
    driver.until(lambda: len(driver.tokens.get((0, 0), [])) > 3)
    submit(driver, 1, "small", LONG)
    driver.until(lambda: [s.status for s in driver.engine.scheduler.waiting_for("old")] == [SequenceStatus.PAUSED])
    retire(driver, "old")
    submit(driver, 2, "wide")
    submit(driver, 3, "old")
    driver.run()
    assert not driver.failed
    assert driver.tokens[0, 0] == alone
    assert len(driver.reasons) == 4


def test_what_an_alias_keeps_there_holds_up_only_what_needs_its_room(start, alone):
    driver = start(32)
    adapters = driver.engine.adapters
    submit(driver, 0, "old", LONG)
    driver.until(lambda: len(driver.tokens.get((0, 0), [])) > 3)
    version = adapters.show("old").version
    retire(driver, "old")
    adapters.alias("prod", f"old@{version}")
    driver.run()
    submit(driver, 1, "wide")
    for request_id, name in enumerate(("small", "prod", "narrow"), 2):
        submit(driver, request_id, name, LONG)
    driver.until(lambda: len(driver.reasons) == 4)
    assert (1, 0) not in driver.reasons
    assert driver.tokens[3, 0] == alone
    adapters.unalias("prod")
    driver.run()
    assert len(driver.reasons) == 5
    assert not driver.failed
