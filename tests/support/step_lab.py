# SPDX-License-Identifier: Apache-2.0
"""An engine whose steps a test writes itself: logits of every row, with whatever adapters the rows have."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Rows
from pathlib import Path

import torch

from multilora_backend.config import Config
from multilora_backend.core import SamplingParams, Sequence, Slot, StepPlan
from multilora_backend.engine.engine import Engine
from multilora_backend.models.batch import Batch
from multilora_backend.protocol import Failed, Outputs, Submit
from tiny_models import ROOM


class StepLab:
    def __init__(self, model: Path, adapters: Path, page: int = 4, **settings) -> None:
        places = {"model": str(model), "adapters": str(adapters), "device": "cpu"}
        self.engine = Engine(Config(**{**places, "block_size": page, **ROOM, **settings}), wake=lambda: None)
        self.page = page
        self._pages = itertools.count(1)

    def sequence(self, asked: str, tokens: list[int], prompt_len: int = 0) -> Sequence:
        """With its adapter on the device, and pages for all its tokens; all of them are prompt unless it is said."""
        adapters = self.engine.adapters
        key = adapters.resolve(asked) if asked else ""
        length = prompt_len or len(tokens)
        made = Sequence(("lab", next(self._pages), 0), length, list(tokens), SamplingParams(), 0, adapter=key)
        deadline = time.monotonic() + 30
        if key:
            adapters.hold(key)
        while key and made.lease is None:
            assert time.monotonic() < deadline, adapters.records[key].reason
            adapters.request(key)
            adapters.poll()
            self.engine.scheduler._sequences.lease(made)
        made.pages = [next(self._pages) for _ in range(-(-len(tokens) // self.page))]
        return made

    def logits(self, *spans: tuple[Sequence, int, int], out: torch.Tensor | None = None) -> torch.Tensor:
        """[T, vocabulary] of a step of (sequence, start, count); in `out` if it is given."""
        runner = self.engine.runner
        batch = Batch.from_plan(StepPlan(tuple(Slot(*span, True) for span in spans)), self.page)
        with torch.inference_mode():
            runner._enter(batch, runner._lora.plan(batch), runner._attention)
            logits = runner.forward(runner._attention, batch.num_rows, None, out=out)
        return logits.clone() if out is None else logits

    def greedy(self, jobs: Rows[tuple[str, list[int]]], count: int) -> list[list[int]]:
        """Output tokens of (adapter, prompt), all of them submitted at once."""
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        for i, (asked, prompt) in enumerate(jobs):
            self.engine.submit("front", Submit(i, prompt, params, asked))
        tokens: list[list[int]] = [[] for _ in jobs]
        while not self.engine.idle:
            if not self.engine.step():
                time.sleep(0.001)
            for message in self.engine.take_replies().get("front", []):
                assert not isinstance(message, Failed), message
                for item in message.items if isinstance(message, Outputs) else ():
                    tokens[item.request_id] += item.token_ids
        self.engine.check_idle()
        return tokens

    def close(self) -> None:
        self.engine.close()
