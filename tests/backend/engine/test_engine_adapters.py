# SPDX-License-Identifier: Apache-2.0
"""Adapters that come, change, move and go while requests run: exact tokens of the revision that each began with."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_models
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.engine.adapters import state_path
from multilora_backend.engine.engine import Engine
from multilora_backend.errors import MultiloraError
from multilora_backend.protocol import AdapterArguments, AdapterCommand, Failed, Outputs, Submit

PROMPT = [5, 6, 7]
LONG = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_models.save_llama(root / "model")
    for seed in range(3):
        tiny_models.save_adapter(root / "model", root / "made" / str(seed), seed, r=8)
    return root


@pytest.fixture(scope="module")
def alone(made: Path) -> dict[str, list[int]]:
    outputs = {f.name: tiny_models.greedy(made / "model", f, PROMPT, LONG) for f in (made / "made").iterdir()}
    assert len({tuple(tokens) for tokens in outputs.values()}) == 3
    return outputs


class Bench:
    """An engine over a folder of adapters that a test rewrites. No watcher but where one is asked for."""

    def __init__(self, made: Path, folder: Path, **settings) -> None:
        self.made, self.folder = made, folder
        self.settings = {"adapters_watch_s": 0.0, "block_size": 4, **tiny_models.ROOM, **settings}
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.failed: dict[int, Failed] = {}
        self.start()

    def start(self) -> None:
        places = {"model": str(self.made / "model"), "adapters": str(self.folder)}
        self.engine = Engine(Config(**places, device="cpu", **self.settings), wake=lambda: None)

    def put(self, name: str, which: int) -> None:
        """As an operator should: the new folder takes the old one's place by a rename."""
        part = self.folder / f".part-{name}"
        shutil.copytree(self.made / "made" / str(which), part)
        if (self.folder / name).exists():
            (self.folder / name).rename(self.folder / f".old-{name}-{time.monotonic_ns()}")
        part.rename(self.folder / name)

    def submit(self, request_id: int, name: str, tokens: int = LONG, **sampling) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **sampling)
        self.engine.submit("front", Submit(request_id, PROMPT, params, name))

    def command(self, action: str, **arguments) -> None:
        self.engine.command("admin", AdapterCommand(1, action, AdapterArguments(**arguments)))

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline
            if not self.engine.step():
                time.sleep(0.002)
            for message in self.engine.take_replies().get("front", []):
                if isinstance(message, Failed):
                    self.failed[message.request_id] = message
                for item in message.items if isinstance(message, Outputs) else ():
                    self.tokens[item.request_id] += item.token_ids

    def finish(self) -> None:
        self.until(lambda: self.engine.idle)
        self.engine.check_idle()


@pytest.fixture
def bench(made: Path, tmp_path: Path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    benches = []

    def start(adapters: dict[str, int], **settings) -> Bench:
        for name, which in adapters.items():
            shutil.copytree(made / "made" / str(which), folder / name)
        benches.append(Bench(made, folder, **settings))
        return benches[-1]

    yield start
    for each in benches:
        each.engine.close()


def test_an_alias_moves_under_traffic(bench, alone):
    run = bench({"one": 0, "two": 1})
    run.command("alias", alias="prod", target="one")
    run.submit(0, "prod")
    run.until(lambda: len(run.tokens[0]) > 3)
    run.command("alias", alias="prod", target="two")
    run.submit(1, "prod")
    run.finish()
    assert (run.tokens[0], run.tokens[1]) == (alone["0"], alone["1"])


def test_who_has_begun_with_a_revision_ends_with_it(bench, alone):
    run = bench({"a": 0}, adapters_watch_s=0.02)
    run.submit(0, "a")
    run.until(lambda: len(run.tokens[0]) > 3)
    first = run.engine.adapters.show("a").version
    # What runs goes on, what waits in the queue with it does as well, what comes later gets the new one.
    run.put("a", 1)
    waiting = 0
    while run.engine.adapters.resolve("a") == "a":
        run.engine.adapters.poll()  # the loop stands still meanwhile, so that nothing ends
        wanted = run.engine._watcher.take()
        if wanted is not None:
            run.engine.adapters.reconcile(wanted)
        time.sleep(0.01)
        waiting += 1
        assert waiting < 3000
    run.submit(1, "a")
    run.submit(2, f"a@{first[:8]}")
    assert len(run.tokens[0]) < LONG
    run.finish()
    assert (run.tokens[0], run.tokens[1], run.tokens[2]) == (alone["0"], alone["1"], alone["0"])
    assert list(run.engine.adapters.records) == ["a@2"]
    with pytest.raises(MultiloraError, match="is no version that is known"):
        run.engine.adapters.resolve(f"a@{first}")


def test_unload_lets_requests_end_and_gives_the_bytes_back(bench, alone):
    run = bench({"a": 0, "b": 1})
    run.submit(0, "a")
    run.until(lambda: len(run.tokens[0]) > 3)
    run.command("unload", name="a")
    run.submit(1, "a")
    run.submit(2, "b")
    run.finish()
    assert "LoRA a is not supported" in run.failed[1].message
    assert (run.tokens[0], run.tokens[2]) == (alone["0"], alone["1"])
    assert (run.engine.adapters.pool.rank > 0).sum() == 1


def test_who_waits_for_what_was_changed_meanwhile_gets_the_change(bench, alone):
    run = bench({"a": 0}, adapter_host_bytes=0)
    run.submit(0, "a", 2)
    run.finish()
    evict(run, "a")
    run.put("a", 1)
    run.submit(1, "a")
    run.submit(2, "a", n=2)
    run.finish()
    assert not run.failed
    assert run.tokens[1] == alone["1"]
    assert sorted(run.tokens[2]) == sorted(alone["1"] * 2)
    assert list(run.engine.adapters.records) == ["a@2"]


def test_who_has_output_of_what_was_changed_meanwhile_fails_instead_of_mixing(bench, alone):
    probe = bench({"a": 0, "b": 1})
    one = 8 * probe.engine.adapters.pool.bytes_per_rank
    run = Bench(
        probe.made,
        probe.folder,
        adapter_host_bytes=0,
        adapter_device_bytes=one,
        tenure_s=0.001,
        max_overtake_s=0.0,
    )
    run.submit(0, "a", 100)
    run.until(lambda: len(run.tokens[0]) > 3)
    run.submit(1, "b")
    # b has the only place for its turn, and a waits for the next one.
    run.until(lambda: "b" in run.engine.adapters.resident())
    run.put("a", 2)
    run.finish()
    run.engine.close()
    assert 3 < len(run.tokens[0]) < 100
    assert "was changed at its source while this request waited" in run.failed[0].message
    assert run.tokens[1] == alone["1"]


def evict(run: Bench, key: str) -> None:
    """As another adapter's load would."""
    run.engine.adapters._life.residency.evict(run.engine.adapters.records[key])


def test_adapters_come_and_go_in_the_watched_folder(bench, alone):
    run = bench({"a": 0}, adapters_watch_s=0.02)
    run.put("b", 1)
    run.until(lambda: "b" in run.engine.adapters.names())
    run.submit(0, "b")
    run.finish()
    shutil.rmtree(run.folder / "b")
    run.until(lambda: "b" not in run.engine.adapters.names())
    run.submit(1, "a")
    run.submit(2, "b")
    run.finish()
    assert (run.tokens[0], run.tokens[1]) == (alone["1"], alone["0"])
    assert "not supported" in run.failed[2].message


def test_what_commands_did_outlives_the_engine(bench, alone):
    run = bench({"a": 0, "b": 1})
    run.command("load", name="mine", source="b", wait=False)
    run.command("alias", alias="prod", target="mine")
    run.command("unload", name="a")
    run.finish()
    run.engine.close()
    assert state_path(run.engine.config) == run.folder / ".multilora.json"
    run.start()
    run.submit(0, "prod")
    run.submit(1, "a")
    run.finish()
    assert run.tokens[0] == alone["1"]
    assert "not supported" in run.failed[1].message


def test_commands_cannot_leave_the_folder(bench, made):
    run = bench({"a": 0})
    for source in (str(made / "made" / "1"), "../../made/1", "hf:acme/lora", "https://example.org/x"):
        with pytest.raises(MultiloraError, match="adapter_roots"):
            run.engine.adapters.load("x", source)
    assert run.engine.adapters.names() == ["a"]
