# SPDX-License-Identifier: Apache-2.0
"""Random commands of operators and changes of sources beside requests: all are answered, and nothing is left behind.

An exception that leaves `step` would be the engine's end. Loads take random times, so a seed does not repeat exactly.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import tiny_models
from engine_bench import ANSWER_S, Driver
from multilora_backend.core import SamplingParams
from multilora_backend.errors import MultiloraError
from multilora_backend.protocol import Abort

STORE = {
    "r3": {"r": 3},
    "r8": {"r": 8},
    "r20": {"r": 20},
    "r40": {"r": 40},
    "dora": {"r": 4, "use_dora": True},
    "invoked": {"r": 5, "alora_invocation_tokens": [11, 12]},
    "broken": {"r": 3},
}
CONFIGURED, NAMES = ("n0", "n1", "n2"), ("n0", "n1", "n2", "n3", "n4")
TRACES = range(16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_models.save_all(tmp_path_factory.mktemp("tiny"), STORE)
    tiny_models.break_adapter(root / "adapters/broken")
    return root


class Operators:
    """What may be done to an engine, at random."""

    def __init__(self, made: Path, folder: Path, rng: random.Random) -> None:
        self.rng, self.folder = rng, folder
        self.store = sorted((made / "adapters").iterdir())
        for name in CONFIGURED:
            shutil.copytree(rng.choice(self.store), folder / name)
        per_rank = Driver(made).engine.adapters.pool.bytes_per_rank
        self.driver = Driver(
            made,
            adapters=str(folder),
            adapter_roots=str(made),
            adapters_watch_s=rng.choice((0.0, 0.02)),
            adapter_host_bytes=rng.choice((0, 60_000, 10**9)),
            adapter_device_bytes=rng.choice((16, 24, 40, 64, 200)) * per_rank,
            adapter_extras_bytes=rng.choice((0, 2**20)),
            async_scheduling=rng.choice(("true", "false")),
            lora_strategy=rng.choice(("bordered", "grouped")),
            max_loras=rng.choice((0, 0, 2)),
            tenure_s=0.02,
            max_overtake_s=rng.choice((0.0, 0.05)),
            adapter_load_threads=rng.choice((1, 2)),
        )
        self.adapters = self.driver.engine.adapters
        pause = random.Random(rng.random())  # the loader's threads take from it in any order
        self.driver.read_slowly(lambda folder: max(0.0, pause.uniform(-0.03, 0.03)))
        self.submitted = 0

    def submit(self) -> None:
        rng, several = self.rng, f"{self.name()}:0.{self.rng.randrange(1, 9)},{self.name()}:0.5"
        prompt = [rng.randrange(3, 60) for _ in range(rng.randrange(1, 30))]
        tokens, n = rng.randrange(1, 12), rng.choice((1, 1, 2))
        params = SamplingParams(temperature=0.0, max_tokens=tokens, n=n, ignore_eos=True)
        adapter = rng.choice((self.name(), self.name(), several, "alias"))
        self.driver.submit(self.submitted, prompt, params, adapter)
        self.submitted += 1

    def name(self) -> str:
        return self.rng.choice(NAMES)

    def load(self) -> None:
        name = self.name()
        self.adapters.load(name, "" if name in CONFIGURED else str(self.rng.choice(self.store)))
        self.adapters.preload(name)

    def alias(self) -> None:
        current = self.adapters.revisions.current.get(self.name())
        if current is not None and current.version:
            self.adapters.alias("alias", f"{current.entry.name}@{current.version[:12]}")

    def change(self) -> None:
        name = self.rng.choice(CONFIGURED)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.rng.random() < 0.85:
            shutil.copytree(self.rng.choice(self.store), self.folder / name)

    def abort(self) -> None:
        self.driver.engine.abort("front", Abort(self.rng.randrange(max(self.submitted, 1)), -1))

    def any(self) -> Callable[[], object]:
        adapters = self.adapters
        rare = [
            *(self.load, self.alias, self.change, self.change, self.abort, lambda: adapters.unalias("alias")),
            *(lambda: adapters.unload(self.name()), lambda: adapters.preload(self.name())),
            *(lambda: adapters.pin(self.name()), lambda: adapters.unpin(self.name())),
        ]
        return self.submit if self.rng.random() < 0.5 else self.rng.choice(rare)

    def leave(self) -> None:
        """Unloads all that is there."""
        for action in (lambda: self.adapters.unalias("alias"), *(lambda n=n: self.adapters.unload(n) for n in NAMES)):
            attempt(action)


def attempt(action: Callable[[], object]) -> None:
    """A refusal is an answer."""
    with suppress(MultiloraError):
        action()


@pytest.mark.parametrize("seed", TRACES)
def test_all_are_answered_and_nothing_is_left(made: Path, tmp_path: Path, seed: int):
    rng = random.Random(seed)
    operators = Operators(made, tmp_path, rng)
    driver, adapters = operators.driver, operators.adapters
    try:
        for _ in range(rng.randrange(20, 120)):
            attempt(operators.any())
            for _ in range(rng.randrange(4)):
                driver.step()
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.01)
        attempt(lambda: adapters.unalias("alias"))  # the last copy of what it names stays, and others wait for the room
        driver.run()
        if driver.engine._watcher is not None:
            driver.engine._watcher.close()  # it would find again what is unloaded, and what has changed meanwhile
        operators.leave()
        deadline = time.monotonic() + ANSWER_S
        while adapters.records:
            assert time.monotonic() < deadline, {key: str(record.state) for key, record in adapters.records.items()}
            driver.step()
            operators.leave()
            time.sleep(0.002)
        assert adapters.stats().bytes["host"][0] == 0
        assert adapters.stats().bytes["device"][0] == 0
    finally:
        driver.engine.close()
