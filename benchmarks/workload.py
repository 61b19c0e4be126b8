# SPDX-License-Identifier: Apache-2.0
"""Drives an engine in this process, as its server does, and keeps the times."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from multilora_backend.adapters.state import AdapterState
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.engine.engine import Engine
from multilora_backend.engine.memory import freeze_heap
from multilora_backend.protocol import Failed, Outputs, Submit

FRONTEND = "benchmark"
IDLE_S = 0.0002
"""Pause when a step had nothing to do: something is still being loaded."""


@dataclass
class Timing:
    """One request: when it was submitted and when each of its tokens came, by time.monotonic()."""

    submitted: float
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.submitted

    def gaps(self, since: float = 0.0) -> list[float]:
        """Seconds between tokens, of those gaps that begin at `since` or later."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return [after - before for before, after in pairs if before >= since]


@dataclass
class Run:
    seconds: float
    tokens: int
    timings: list[Timing]
    load_seconds: list[float]
    """From the request for an adapter to its being resident, for each one that became so meanwhile."""

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


class Driver:
    """One engine and the requests of one benchmark; requests are random prompts, which no prefix cache can know."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self._generator = torch.Generator().manual_seed(seed)
        self._timings: dict[int, Timing] = {}
        self._next = 0

    def submit(self, adapters: Iterable[str], inputs: int, outputs: int, temperature: float = 0.0) -> None:
        """One request for each entry of `adapters`; the empty name is the base model."""
        names = list(adapters)
        prompts = torch.randint(0, self.engine.card.vocab_size, (len(names), inputs), generator=self._generator)
        sampling = SamplingParams(temperature=temperature, max_tokens=outputs, ignore_eos=True)
        for name, prompt in zip(names, prompts.tolist(), strict=True):
            self._timings[self._next] = Timing(time.monotonic())
            self.engine.submit(FRONTEND, Submit(self._next, prompt, sampling, name))
            self._next += 1

    def step(self) -> int:
        """One step of the engine; returns the tokens that came out. Raises RuntimeError if a request failed."""
        if not self.engine.step():
            time.sleep(IDLE_S)
        tokens = 0
        for message in self.engine.take_replies().get(FRONTEND, ()):
            if isinstance(message, Failed):
                raise RuntimeError(message.message)
            if isinstance(message, Outputs):
                now = time.monotonic()
                for item in message.items:
                    tokens += len(item.token_ids)
                    self._timings[item.request_id].tokens += [now] * len(item.token_ids)
        return tokens

    def all_started(self) -> bool:
        """Whether every request has its first token: what follows is decode alone."""
        return all(timing.tokens for timing in self._timings.values())

    def finish(self, between: Callable[[], None] = lambda: None) -> Run:
        """Steps until every request has ended, calling `between` after each step."""
        self.engine.adapters.stats()  # forgets earlier loads
        started = time.monotonic()
        tokens = 0
        while self.engine.scheduler.has_work:
            tokens += self.step()
            between()
        seconds = time.monotonic() - started
        timings, self._timings = list(self._timings.values()), {}
        return Run(seconds, tokens, timings, self.engine.adapters.stats().load_seconds)

    def settle(self) -> None:
        """Waits for loads that are under way."""
        while self.engine.adapters.stats().by_state[AdapterState.LOADING.value]:
            self.engine.step()
            time.sleep(IDLE_S)

    def load(self, adapters: Sequence[str], timeout_s: float = 300.0) -> None:
        """Makes adapters resident without any request. Raises RuntimeError if they do not become so."""
        manager = self.engine.adapters
        deadline = time.monotonic() + timeout_s
        while cold := [name for name in adapters if name not in manager.resident()]:
            states = {name: manager.request(name, protect=adapters) for name in cold}
            failed = [name for name, state in states.items() if state is AdapterState.FAILED]
            if failed or time.monotonic() > deadline:
                raise RuntimeError(f"adapters do not become resident: {', '.join(failed or cold)}")
            self.engine.step()
            time.sleep(IDLE_S)


@contextmanager
def running(**settings: object) -> Iterator[tuple[Driver, float]]:
    """An engine and the seconds from its construction to ready. One a process on CUDA: not all memory comes back."""
    started = time.monotonic()
    engine = Engine(Config.from_mapping(settings, "benchmark"), wake=lambda: None)
    freeze_heap()
    try:
        yield Driver(engine), time.monotonic() - started
    finally:
        gc.unfreeze()
        engine.close()
