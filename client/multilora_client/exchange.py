# SPDX-License-Identifier: Apache-2.0
"""The part of a request's life that is not I/O, shared by the sync and the asyncio client."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

from multilora_client.errors import RequestTimeout, ServerError, ServerUnavailable
from multilora_client.types import Choice, Chunk, Completion
from multilora_client.wire import Request

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0


class Exchange:
    """One request: its deadline, its retries, its clock, and what has arrived so far.

    The deadline covers everything from `start` on, retries and the pauses between them included.
    """

    def __init__(self, request: Request, timeout: float, retries: int) -> None:
        self.request = request
        self._timeout = timeout
        self._retries_left = retries
        self._failures = 0
        self._chunks: list[Chunk] = []
        self._unfinished: set[int] | None = None
        self._start = self._first = self._last = math.nan

    def start(self) -> None:
        """To be called before each attempt; the first call starts the clock."""
        if math.isnan(self._start):
            self._start = time.monotonic()

    def remaining(self) -> float | None:
        """See `wire.RemainingTime`."""
        if math.isinf(self._timeout):
            return None
        left = self._start + self._timeout - time.monotonic()
        if left <= 0:
            raise self.timed_out()
        return left

    def timed_out(self) -> RequestTimeout:
        return RequestTimeout(f"no complete answer within {self._timeout:g} s")

    def backoff(self, error: ServerUnavailable) -> float:
        """Seconds to wait before the next attempt; raises `error` if there must be none.

        Once a token has arrived the caller has seen it, and a second run might tell another story.
        """
        if self._chunks or self._retries_left <= 0:
            raise error
        # Full steps would send all clients of a restarted server back at the same moment.
        delay = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2**self._failures) * random.uniform(0.5, 1.0)
        left = self.remaining()
        if left is not None and delay >= left:
            raise error
        self._retries_left -= 1
        self._failures += 1
        return delay

    def take(self, chunk: Chunk) -> Chunk:
        """Books a chunk that has arrived. Returns it with `final` set if all its texts have now ended."""
        self._last = time.monotonic()
        if self._unfinished is None:
            self._first = self._last
            self._unfinished = set(range(len(chunk.choices)))
        elif len(chunk.choices) != len(self._chunks[0].choices):
            raise ServerError(
                f"a response with {len(chunk.choices)} texts after one with {len(self._chunks[0].choices)}"
            )
        self._unfinished -= {i for i, choice in enumerate(chunk.choices) if choice.finish_reason}
        if not self._unfinished and not chunk.final:
            # Over HTTP this is the only sign: the events of a stream do not carry Triton's final flag.
            chunk = replace(chunk, final=True)
        self._chunks.append(chunk)
        return chunk

    def completion(self) -> Completion:
        """All that has arrived as one answer. Raises ServerError if nothing has."""
        if not self._chunks:
            raise ServerError("no part of the answer has arrived")
        parts = zip(*(chunk.choices for chunk in self._chunks), strict=True)
        return Completion(
            choices=tuple(_joined(choice_parts) for choice_parts in parts),
            num_input_tokens=max(chunk.num_input_tokens for chunk in self._chunks),
            adapter=self.request.adapter,
            ttft_s=self._first - self._start if self.request.tensors.get("stream") else None,
            total_s=self._last - self._start,
        )


def _joined(parts: tuple[Choice, ...]) -> Choice:
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    sums = [part.cumulative_logprob for part in parts if part.cumulative_logprob is not None]
    reasons = [part.finish_reason for part in parts if part.finish_reason]
    return Choice(
        text="".join(part.text for part in parts),
        finish_reason=reasons[-1] if reasons else None,
        num_output_tokens=sum(part.num_output_tokens for part in parts),
        cumulative_logprob=sums[-1] if sums else None,
        logprobs=tuple(token for tokens in logprobs for token in tokens) if logprobs else None,
    )
