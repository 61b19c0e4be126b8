# SPDX-License-Identifier: Apache-2.0
"""The engine without sockets: whatever a step dies of, what comes after it is computed from what is really there."""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from msgspec.structs import replace

from engine_bench import GREEDY, PROMPTS, Driver
from multilora_backend.adapters.border import Border
from multilora_backend.core import StepPlan
from multilora_backend.engine.runner import Launched

pytestmark = pytest.mark.usefixtures("mode")

KINDS = {
    "greedy": GREEDY,
    "penalised": replace(GREEDY, frequency_penalty=1.5, repetition_penalty=1.3),
    "seeded": replace(GREEDY, temperature=1.0, seed=3, top_p=0.9, logprobs=1),
}


class OutOfLuck(RuntimeError):
    pass


class Saboteur:
    """Makes launches fail at any call, Python's or C's, that our code makes or answers."""

    def __init__(self, driver: Driver) -> None:
        self.launches = 0
        """Still to succeed before one fails."""
        self.share = 2.0
        """Where that one fails: 0 at its first call, 1 at its last; above 1 nowhere."""
        self.failures = 0
        self._launch = driver.engine.runner.launch
        self._calls = self._last_calls = self._fatal = 0
        driver.engine.runner.launch = self._watched  # type: ignore[method-assign]

    def _watched(self, plan: StepPlan) -> Launched:
        self._calls, self._fatal = 0, 0
        if not self.launches:
            self._fatal = 1 + int(self.share * self._last_calls)
        self.launches -= 1
        sys.setprofile(self._look)
        try:
            launched = self._launch(plan)
            self._last_calls = self._calls
            return launched
        finally:
            sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_call") and frame.f_globals.get("__name__", "").startswith("multilora_"):
            self._calls += 1
            if self._calls == self._fatal:
                self.failures += 1
                raise OutOfLuck(f"{frame.f_code.co_filename}:{frame.f_lineno}")


def test_whatever_a_launch_dies_of_later_requests_say_what_they_say_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Adapters take turns, and the border holds the small ones or the large one: so most turns begin with copies."""
    monkeypatch.setattr("multilora_backend.models.bordered.Border", partial(Border, tiers=(16,)))
    alone: dict[tuple[str, str], list[int]] = {}
    quiet = Driver(folder)
    for name, prompt in PROMPTS.items():
        for kind, sampling in KINDS.items():
            quiet.submit(len(alone), prompt, sampling, name)
            alone[name, kind] = quiet.run().tokens[len(alone), 0]
    driver = Driver(folder, max_loras=1, max_num_seqs=2)
    saboteur, rng, spared = Saboteur(driver), random.Random(1), 0
    for attempt in range(40):
        names = rng.sample([*PROMPTS], 2)
        jobs = {10 * attempt + i: (rng.choice(names), rng.choice([*KINDS])) for i in range(5)}
        for request_id, (name, kind) in jobs.items():
            driver.submit(request_id, PROMPTS[name], KINDS[kind], name)
        # Most calls are the model's; what may leave traces comes before it, and in the first steps that decode.
        saboteur.launches, saboteur.share = rng.choice([1, 2, rng.randrange(12)]), rng.random() ** 2
        driver.run()
        for request_id, job in jobs.items():
            if request_id not in driver.failed:
                spared += 1
                assert driver.tokens[request_id, 0] == alone[job], f"{job} after {list(driver.failed.values())[-1:]}"
    assert all("OutOfLuck" in failed.message for failed in driver.failed.values())
    assert saboteur.failures > 30
    assert spared > 40


def die(*_: Any) -> Any:
    raise OutOfLuck


@pytest.mark.parametrize("adapter", ["small", "attention", "rank-stabilised"])
def test_a_step_that_dies_before_its_copies_leaves_none_to_rely_on(folder: Path, expected: dict, adapter: str):
    driver = Driver(folder)
    for name in PROMPTS:  # another adapter's rows lie where its own will
        if name != adapter:
            driver.submit(0, PROMPTS[name], GREEDY, name)
            driver.run()
    inputs = driver.engine.runner._inputs
    load = inputs.load
    driver.submit(1, PROMPTS[adapter], GREEDY, adapter)
    inputs.load = lambda batch, segments: die() if batch.one_row_each else load(batch, segments)
    driver.run()
    inputs.load = load
    assert driver.failed[1].message.startswith("the step failed: OutOfLuck")
    driver.submit(2, PROMPTS[adapter], GREEDY, adapter)
    driver.submit(3, PROMPTS["small"], GREEDY, "small")
    driver.run()
    assert driver.tokens[2, 0] == expected[adapter]
    assert driver.tokens[3, 0] == expected["small"]


def test_a_step_that_turns_out_to_have_failed_may_not_have_made_its_copies(
    folder: Path, expected: dict, monkeypatch: pytest.MonkeyPatch
):
    driver = Driver(folder)
    launch = driver.engine.runner.launch

    def launch_broken(plan: StepPlan) -> Launched:
        with monkeypatch.context() as patch:
            patch.setattr("multilora_backend.models.bordered.copy_blocks", lambda *_: None)
            launched = launch(plan)
        if launched.pending is not None:
            launched.pending.result = die  # type: ignore[method-assign]
        return launched

    driver.submit(1, [5], GREEDY, "small")
    driver.engine.runner.launch = launch_broken  # type: ignore[method-assign]
    driver.run()
    driver.engine.runner.launch = launch  # type: ignore[method-assign]
    assert list(driver.failed) == [1]
    driver.submit(2, PROMPTS["small"], GREEDY, "small")
    assert driver.run().tokens[2, 0] == expected["small"]
