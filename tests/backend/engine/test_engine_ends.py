# SPDX-License-Identifier: Apache-2.0
"""The engine without sockets: what is refused, aborted or fails ends by itself and harms nobody."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from engine_bench import ADAPTERS, GREEDY, PROMPTS, Driver
from multilora_backend.core import SamplingParams
from multilora_backend.errors import ErrorCode
from multilora_backend.protocol import Abort, Submit

pytestmark = pytest.mark.usefixtures("mode")


def test_abort_takes_one_sequence_or_all_and_frees_at_once(folder: Path):
    driver = Driver(folder)
    driver.submit(0, [5, 6], SamplingParams(n=3, max_tokens=50, ignore_eos=True))
    driver.submit(1, [5, 6], GREEDY, "small")
    driver.step()
    driver.engine.abort("front", Abort(0, 1))
    driver.step()
    assert {s.key[1:] for s in driver.engine.scheduler.running.values()} >= {(0, 0), (0, 2)}
    assert driver.engine.scheduler.find(("front", 0, 1)) is None
    driver.engine.abort("front", Abort(0))
    driver.engine.abort("front", Abort(99))
    driver.run()
    assert len(driver.tokens[1, 0]) == 9


def test_an_abort_costs_the_same_however_many_wait(folder: Path):
    engine = Driver(folder, max_waiting=8000).engine

    def seconds(count: int) -> float:
        """All of them wait, and all are aborted."""
        for number in range(count):
            engine.submit("front", Submit(number, [5, 6], GREEDY))
        began = time.process_time()
        for number in range(count):
            engine.abort("front", Abort(number))
        took = time.process_time() - began
        assert not engine.scheduler.has_work
        return took

    few, many = min(seconds(500) for _ in range(3)), seconds(8000)
    assert many < 64 * few, "16 times as many take 16 times as long, or 256 if each goes through all"


def test_a_front_end_that_leaves_takes_its_requests_along(folder: Path):
    driver = Driver(folder)
    driver.submit(0, [5, 6], SamplingParams(max_tokens=100, ignore_eos=True))
    driver.step()
    driver.engine.drop_frontend("front")
    assert not driver.engine.scheduler.has_work
    driver.engine.check_idle()


def test_refusals_name_field_and_limit(folder: Path):
    driver = Driver(folder, max_waiting=2)
    driver.submit(0, [5], GREEDY, "nobody")
    driver.submit(1, [5] * 128, GREEDY)
    driver.submit(2, [], GREEDY)
    driver.submit(3, [61], GREEDY)
    driver.submit(4, [5], SamplingParams(n=3))
    driver.submit(5, [5], SamplingParams(n=17))
    driver.run()
    known = list(ADAPTERS)
    assert driver.failed[0].message == f"LoRA nobody is not supported, we currently support {sorted(known)}"
    assert driver.failed[1].message == "text_input: must be 1 to 127 tokens, got 128"
    assert driver.failed[2].code is ErrorCode.INVALID_ARG
    assert "vocabulary's 61" in driver.failed[3].message
    assert driver.failed[4].code is ErrorCode.UNAVAILABLE
    assert "max_waiting" in driver.failed[4].message
    assert driver.failed[5].message == "n: must be at most max_n, 16, got 17"


def test_a_broken_adapter_fails_its_requests_only(folder: Path, expected: dict, tmp_path: Path):
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    weights = tmp_path / "adapters" / "attention" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    driver = Driver(folder, adapters=str(tmp_path / "adapters"))
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        driver.submit(i, prompt, GREEDY, name)
    driver.run()
    assert list(driver.failed) == [[*PROMPTS].index("attention")]
    assert "attention could not be loaded" in next(iter(driver.failed.values())).message
    for i, name in enumerate(PROMPTS):
        assert name == "attention" or driver.tokens[i, 0] == expected[name]
    driver.submit(9, [5], GREEDY, "attention")
    assert 9 not in driver.run().tokens, "the second request is refused at once"
    assert driver.engine.stats().adapters_by_state["failed"] == 1


def test_a_step_that_dies_ends_its_requests_and_nothing_else(folder: Path, expected: dict):
    driver = Driver(folder)
    launch = driver.engine.runner.launch

    def die(plan):
        raise RuntimeError("out of luck")

    driver.submit(0, PROMPTS[""], GREEDY)
    driver.engine.runner.launch = die
    driver.step()
    driver.engine.runner.launch = launch
    driver.submit(1, PROMPTS["small"], GREEDY, "small")
    driver.run()
    assert driver.failed[0].message == "the step failed: RuntimeError: out of luck"
    assert driver.tokens[1, 0] == expected["small"]


def test_a_step_whose_results_cannot_be_read_ends_its_requests_and_nothing_else(folder: Path, expected: dict):
    driver = Driver(folder)
    launch = driver.engine.runner.launch

    def launch_broken(plan):
        broken = launch(plan)
        broken_steps.append(broken)
        broken.pending.result = die
        return broken

    def die():
        raise RuntimeError("out of luck")

    broken_steps: list = []
    driver.submit(0, PROMPTS[""], GREEDY)
    driver.engine.runner.launch = launch_broken
    driver.step()
    driver.engine.runner.launch = launch
    driver.submit(1, PROMPTS["small"], GREEDY, "small")
    driver.run()
    assert len(broken_steps) == 1
    assert driver.failed[0].message == "the step failed: RuntimeError: out of luck"
    assert 0 not in {request_id for request_id, _ in driver.tokens}
    assert driver.tokens[1, 0] == expected["small"]
