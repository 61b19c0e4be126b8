# SPDX-License-Identifier: Apache-2.0
"""A builder and an observer of which everything is known, for the sending thread."""

from __future__ import annotations

import numpy as np

from multilora_backend.core import FinishReason
from multilora_backend.errors import MultiloraError
from multilora_backend.frontend.outbox import Delivery, Outbox, Outcome
from multilora_backend.protocol import Output


class Letters:
    """A builder whose tokens are characters; a "!" is a stop string, a "?" a bug."""

    def __init__(self) -> None:
        self.finished = False
        self.num_output_tokens = 0
        self.waiting = ""

    def add(self, output: Output) -> list[int]:
        text = "".join(map(chr, output.token_ids))
        if "?" in text:
            raise ZeroDivisionError("a bug")
        self.num_output_tokens += len(text)
        self.waiting += text
        stopped = "!" in text
        self.finished = stopped or output.finish_reason is not None
        return [output.index] if stopped else []

    def take(self) -> dict[str, np.ndarray] | None:
        if not self.waiting:
            return None
        text, self.waiting = self.waiting, ""
        return {"text_output": np.array([text.encode()], dtype=object)}


class Parted(Letters):
    """Of two sequences, both of which must end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = 0

    def add(self, output: Output) -> list[int]:
        self.ended += output.finish_reason is not None
        stopped = super().add(output)
        self.finished = self.ended == 2
        return stopped


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.stopped: list[int] = []
        self.closed: list[tuple[int, Outcome]] = []
        self.ticks = 0

    def on_output(self, delivery: Delivery, output: Output, num_tokens: int, stopped: list[int]) -> None:
        self.stopped += stopped

    def on_closed(self, delivery: Delivery, outcome: Outcome, error: MultiloraError | None) -> None:
        self.closed.append((delivery.request_id, outcome))

    def on_tick(self) -> None:
        self.ticks += 1


def say(outbox: Outbox, delivery: Delivery, text: str, last: bool = False) -> None:
    for i, letter in enumerate(text):
        reason = FinishReason.STOP if last and i == len(text) - 1 else None
        outbox.push(delivery, Output(delivery.request_id, 0, [ord(letter)], finish_reason=reason))
