# SPDX-License-Identifier: Apache-2.0
"""An adapter is moved in the pool while sequences run with it, and says what it would have said."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_models
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.engine.engine import Engine
from multilora_backend.protocol import Failed, Outputs, Submit

RANKS = {"first": 8, "long": 8, "third": 8, "wide": 24}
LENGTHS = {"first": 1, "long": 24, "third": 1, "wide": 4}
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_models.save_llama(root / "model")
    for seed, (name, rank) in enumerate(RANKS.items()):
        tiny_models.save_adapter(root / "model", root / "adapters" / name, seed, r=rank)
    return root


class Run:
    def __init__(self, folder: Path, **settings) -> None:
        places = {"model": str(folder / "model"), "adapters": str(folder / "adapters"), "device": "cpu"}
        room = {**tiny_models.ROOM, **settings}
        self.engine = Engine(Config(**places, block_size=4, **room), wake=lambda: None)
        self.tokens: dict[int, list[int]] = defaultdict(list)

    def submit(self, name: str) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=LENGTHS[name], ignore_eos=True)
        self.engine.submit("front", Submit(list(RANKS).index(name), PROMPT, sampling, name))

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline
            if not self.engine.step():
                time.sleep(0.002)
            for message in self.engine.take_replies().get("front", []):
                assert not isinstance(message, Failed), message
                for item in message.items if isinstance(message, Outputs) else ():
                    self.tokens[item.request_id] += item.token_ids


@pytest.mark.parametrize(
    ("strategy", "overlap"), [("grouped", "false"), ("reference", "true"), ("bordered", "true"), ("bordered", "false")]
)
def test_a_leased_adapter_moves_between_two_steps(folder: Path, strategy: str, overlap: str):
    probe = Run(folder).engine
    four_pages = 32 * probe.adapters.pool.bytes_per_rank
    probe.close()
    run = Run(folder, adapter_device_bytes=four_pages, lora_strategy=strategy, async_scheduling=overlap)
    pool = run.engine.adapters.pool
    for name in ("first", "long", "third"):
        run.submit(name)
        run.until(lambda name=name: bool(run.tokens[list(RANKS).index(name)]))
    slot = pool.rank_start.tolist().index(8)
    assert (pool.rank[slot], sorted(pool.rank_start[pool.rank > 0])) == (8, [0, 8, 16])
    assert len(run.tokens[1]) < LENGTHS["long"] - 6
    # 24 ranks beside the 8 of the long one, which lies in the middle of the other three pages.
    run.submit("wide")
    run.until(lambda: bool(run.tokens[3]))
    assert len(run.tokens[1]) < LENGTHS["long"], "it was to be moved while in use"
    run.until(lambda: run.engine.idle)
    for index, (name, length) in enumerate(LENGTHS.items()):
        alone = tiny_models.greedy(folder / "model", folder / "adapters" / name, PROMPT, length)
        assert run.tokens[index] == alone, name
    assert sorted(pool.rank[pool.rank > 0]) == [8, 24]
    assert pool.rank[slot] == 8
    assert pool.rank_start[slot] != 8
    run.engine.check_idle()
    run.engine.close()
