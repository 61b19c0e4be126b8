# SPDX-License-Identifier: Apache-2.0
"""An engine without sockets over a tiny model and three adapters."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import tiny_models
from multilora_backend.config import Config
from multilora_backend.core import FinishReason, SamplingParams
from multilora_backend.engine.engine import Engine
from multilora_backend.protocol import Failed, Outputs, Submit

ADAPTERS = {
    "small": {"r": 3},
    "attention": {"r": 7, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_alpha": 14},
    "rank-stabilised": {"r": 16, "use_rslora": True, "lora_alpha": 6},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
ANSWER_S = 60.0
PROMPTS = {"": [5, 6, 7], "small": [9, 8, 7, 6, 5, 4, 3], "attention": [5, 6, 7], "rank-stabilised": list(range(3, 40))}


class Driver:
    """Submits, steps and collects, as the server does."""

    MODE: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: Path, **settings) -> None:
        defaults = {"model": str(folder / "model"), "adapters": str(folder / "adapters"), "device": "cpu"}
        defaults |= {"block_size": 4, **tiny_models.ROOM, **self.MODE}
        self.engine = Engine(Config(**{**defaults, **settings}), wake=lambda: None)
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.reasons: dict[tuple[int, int], FinishReason] = {}
        self.failed: dict[int, Failed] = {}
        self.outputs: list = []

    def submit(self, request_id: int, prompt: list[int], sampling: SamplingParams, adapter: str = "", **more) -> None:
        self.engine.submit("front", Submit(request_id, prompt, sampling, adapter, **more))

    def step(self) -> bool:
        busy = self.engine.step()
        for message in self.engine.take_replies().get("front", []):
            if isinstance(message, Failed):
                self.failed[message.request_id] = message
            elif isinstance(message, Outputs):
                for item in message.items:
                    key = (item.request_id, item.index)
                    self.outputs.append(item)
                    self.tokens.setdefault(key, []).extend(item.token_ids)
                    if item.finish_reason is not None:
                        self.reasons[key] = item.finish_reason
        return busy

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + ANSWER_S
        while not done():
            assert time.monotonic() < deadline
            if not self.step():
                time.sleep(0.002)  # a load is under way

    def run(self) -> Driver:
        self.step()
        self.until(lambda: self.engine.idle)
        self.engine.check_idle()
        return self

    def wait_until_read(self) -> None:
        """Until all that was asked for has been read; the next step hears of it."""
        assert self.engine.adapters._loader.wait_idle(ANSWER_S)

    def read_slowly(self, seconds: Callable[[Path], float]) -> None:
        """Reading a folder takes so much longer from now on."""
        loader = self.engine.adapters._loader
        read = loader._read

        def slow(folder: Path, source):
            time.sleep(seconds(folder))
            return read(folder, source)

        loader._read = slow
