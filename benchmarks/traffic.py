# SPDX-License-Identifier: Apache-2.0
"""Requests and when they start, the same for the engine alone and through Triton; and what is kept of each.

Standard library only: the client processes import it, whichever interpreter they run on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    prompt: str
    adapter: str
    """Empty: the base model."""
    at: float = 0.0
    """Seconds after the start, for open traffic."""


@dataclass(frozen=True)
class Traffic:
    """Closed: always `concurrency` requests in flight. Open (`concurrency` 0): each starts at its own time."""

    requests: list[Request]
    output: int
    concurrency: int

    def may_start(self, index: int, running: int, now: float) -> bool:
        return running < self.concurrency if self.concurrency else self.requests[index].at <= now

    def wait_s(self, index: int, now: float) -> float | None:
        """How long nothing can start by itself; None: until a request ends."""
        if self.concurrency or index >= len(self.requests):
            return None
        return max(0.0, self.requests[index].at - now)

    def split(self, parts: int) -> list[Traffic]:
        """For several client processes; each gets its share of the requests and of the concurrency."""
        parts = min(parts, self.concurrency or parts, len(self.requests))
        return [
            Traffic(self.requests[i::parts], self.output, len(range(i, self.concurrency, parts))) for i in range(parts)
        ]


@dataclass
class Record:
    """One request's times by time.monotonic(), which all processes of a Linux machine share."""

    submitted: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    responses: int = 0

    def take(self, now: float, tokens: int) -> None:
        if tokens:
            self.first = self.first or now
            self.last = now
            self.tokens += tokens
            self.responses += 1


@dataclass
class Prompts:
    """Random words of a vocabulary `w0`, `w1`, ...: as many tokens as words, and no two prompts alike."""

    vocabulary: int
    words: int
    generator: random.Random = field(default_factory=lambda: random.Random(0))

    def __call__(self) -> str:
        return " ".join(f"w{self.generator.randrange(self.vocabulary)}" for _ in range(self.words))


def poisson(rate: float, count: int, seed: int = 0) -> list[float]:
    """Times of `count` arrivals at `rate` a second."""
    generator = random.Random(seed)
    times, at = [], 0.0
    for _ in range(count):
        at -= math.log(1.0 - generator.random()) / rate
        times.append(at)
    return times


def tokens_per_s(records: Sequence[Record]) -> float:
    """From the first submission to the last token."""
    seconds = max(record.last for record in records) - min(record.submitted for record in records)
    return sum(record.tokens for record in records) / seconds
