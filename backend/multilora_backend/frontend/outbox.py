# SPDX-License-Identifier: Apache-2.0
"""The one thread that answers requests: it alone calls response senders and pb_utils' metrics.

With a thread for each request Triton 2.51 dies of a segmentation fault in libtriton_python.so from 4 streams on.
A send waits for tritonserver: 70 us with nothing else to do, 250 beside 256 streams, so one thread gives 2,000 to 6,500
responses a second. When it lags, the tokens that have come for a request meanwhile are merged into its next response.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np

from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.request import GenerateRequest
from multilora_backend.protocol import Output

log = logging.getLogger(__name__)

CANCEL_INTERVAL_S = 0.03
"""How often a request's client is asked for, unless that takes more than `CANCEL_SHARE` of the thread's time."""
CANCEL_SHARE = 0.1
"""A question whether a client is still there is a round trip to tritonserver: 40 us on an idle machine, 70 to 210
beside 256 streams, where 2,200 of them a second took a fifth of the time in which responses are sent."""
CANCEL_BURST_S = 0.01
"""So much of the time in which nothing was asked is made up for: questions hold a response up for a millisecond."""
TICK_S = 0.25
CANCELLED = "Request was cancelled"
"""vllm_backend's words."""


class Sender(Protocol):
    """Triton's response sender of one request; nothing may be called after a final response or an error."""

    def send(self, tensors: dict[str, np.ndarray], final: bool) -> None: ...

    def fail(self, error: MultiloraError) -> None: ...

    def is_cancelled(self) -> bool: ...


class Builder(Protocol):
    """See response.ResponseBuilder."""

    @property
    def finished(self) -> bool: ...

    num_output_tokens: int

    def add(self, output: Output) -> list[int]: ...

    def take(self) -> dict[str, np.ndarray] | None: ...


class Outcome(Enum):
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False)
class Delivery:
    """A request in flight, from its acceptance to its last response. Marked fields belong to the outbox's thread."""

    request_id: int
    sender: Sender
    request: GenerateRequest | None = None
    """None for a request that was refused."""
    builder: Builder | None = None
    arrival: float = field(default_factory=time.monotonic)
    times_retokenised: int = 0
    incoming: deque[Output | MultiloraError] = field(default_factory=deque)
    """What the sender thread has not looked at yet. Anybody appends, by `Outbox.push`."""
    queued: bool = False
    """It has a place already, however many tokens wait; only its end takes another one, among the urgent."""
    served: bool = False
    """[outbox] Its first tokens were looked at."""
    first_output: float = 0.0
    last_output: float = 0.0
    """[outbox] time.monotonic() when tokens were taken in."""
    closed: bool = False
    """[outbox] The last response or an error was sent."""
    cancel_due: float = 0.0
    """[outbox] When to ask next whether the client is still there."""


class Observer(Protocol):
    """Whom the outbox tells; all calls are made by its thread."""

    def on_output(self, delivery: Delivery, output: Output, num_tokens: int, stopped: list[int]) -> None:
        """An output was taken in: so many tokens of it count, and these sequences met a stop string.

        The engine does not know of stop strings.
        """

    def on_closed(self, delivery: Delivery, outcome: Outcome, error: MultiloraError | None) -> None:
        """The last response of a request was sent, or could not be."""

    def on_tick(self) -> None:
        """Every quarter of a second: time for whatever must happen on this thread."""


class Outbox:
    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._queue: SimpleQueue[Delivery | None] = SimpleQueue()
        self._urgent: deque[Delivery] = deque()
        """First tokens and ends overtake all others: a client waits for the ones, and sends its next request after the
        others."""
        self._watched: deque[Delivery] = deque()
        self._next_question = 0.0
        self._closing = False
        self._next_tick = 0.0
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def watch(self, delivery: Delivery) -> None:
        """Begins to look whether the request's client is still there."""
        delivery.cancel_due = time.monotonic() + CANCEL_INTERVAL_S
        self._watched.append(delivery)
        self._queue.put(None)

    def push(self, delivery: Delivery, item: Output | MultiloraError) -> None:
        """Hands over an output, or the error that ends the request. Never blocks; any thread."""
        # The order matters: the sender clears `queued` before it empties `incoming`, so nothing is left behind.
        delivery.incoming.append(item)
        ends = isinstance(item, MultiloraError) or item.finish_reason is not None
        if delivery.queued and not ends:
            return
        delivery.queued = True
        if ends or not delivery.served:
            self._urgent.append(delivery)  # the place in the queue that it may have stays, and will find nothing left
            self._queue.put(None)
        else:
            self._queue.put(delivery)

    def close(self) -> None:
        """Sends what was pushed before, then ends the thread."""
        self._closing = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                delivery = self._queue.get(timeout=self._patience())
            except Empty:
                if self._closing:
                    break
                delivery = None
            for _ in range(len(self._urgent)):  # those that come meanwhile are of the next round: all have their turn
                self._guarded(self._serve, self._urgent.popleft())
            if delivery is not None:
                self._guarded(self._serve, delivery)
            now = time.monotonic()
            self._look_for_cancelled(now)
            if now >= self._next_tick:
                self._next_tick = now + TICK_S
                self._tick()
        self._tick()

    def _tick(self) -> None:
        try:
            self._observer.on_tick()
        except Exception:  # metrics are not worth a request
            log.exception("the periodic work failed")

    def _patience(self) -> float:
        """How long to wait for something to send."""
        if self._closing:
            return 0.0
        due = min(self._next_tick, self._watched[0].cancel_due) if self._watched else self._next_tick
        return max(0.001, due - time.monotonic())

    def _guarded(self, act: Callable[[Delivery], None], delivery: Delivery) -> None:
        """Whatever goes wrong with one request ends that request and not the thread, which serves all of them."""
        try:
            act(delivery)
        except Exception as error:  # pb_utils raises several types, and builders may have bugs
            log.exception("request %d could not be answered", delivery.request_id)
            if not delivery.closed:
                self._fail(delivery, MultiloraError(ErrorCode.INTERNAL, f"the response could not be sent: {error}"))

    def _serve(self, delivery: Delivery) -> None:
        delivery.queued = False
        delivery.served = True
        builder = delivery.builder
        while delivery.incoming:
            item = delivery.incoming.popleft()
            if delivery.closed:
                continue
            if isinstance(item, MultiloraError) or builder is None:
                self._fail(delivery, item if isinstance(item, MultiloraError) else _no_builder())
                continue
            before = builder.num_output_tokens
            stopped = builder.add(item)
            delivery.last_output = time.monotonic()
            delivery.first_output = delivery.first_output or delivery.last_output
            self._observer.on_output(delivery, item, builder.num_output_tokens - before, stopped)
        if delivery.closed or builder is None:
            return
        tensors = builder.take()
        if tensors is not None:
            final = builder.finished
            delivery.sender.send(tensors, final)
            if final:
                delivery.closed = True
                self._observer.on_closed(delivery, Outcome.FINISHED, None)

    def _look_for_cancelled(self, now: float) -> None:
        """Asks for those whose time has come, the longest unasked first."""
        while self._watched and (
            self._watched[0].closed or max(self._watched[0].cancel_due, self._next_question) <= now
        ):
            delivery = self._watched.popleft()
            if delivery.closed:
                continue
            self._guarded(self._ask, delivery)
            asked, now = now, time.monotonic()
            self._next_question = max(self._next_question, asked - CANCEL_BURST_S) + (now - asked) / CANCEL_SHARE
            delivery.cancel_due = now + CANCEL_INTERVAL_S
            self._watched.append(delivery)

    def _ask(self, delivery: Delivery) -> None:
        if delivery.sender.is_cancelled():
            self._fail(delivery, MultiloraError(ErrorCode.CANCELLED, CANCELLED))

    def _fail(self, delivery: Delivery, error: MultiloraError) -> None:
        delivery.closed = True
        outcome = Outcome.CANCELLED if error.code is ErrorCode.CANCELLED else Outcome.FAILED
        try:
            delivery.sender.fail(error)
        except Exception as problem:  # the client's stream may be gone; the request must end all the same
            log.warning("request %d: its error could not be sent: %s", delivery.request_id, problem)
        self._observer.on_closed(delivery, outcome, error)


def _no_builder() -> MultiloraError:
    return MultiloraError(ErrorCode.INTERNAL, "an output for a request that was refused")
