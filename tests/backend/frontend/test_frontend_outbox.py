# SPDX-License-Identifier: Apache-2.0
"""The one sending thread: merging, first tokens first, cancellation, and one request's trouble staying its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from frontend_fakes import FakeSender, wait_until
from multilora_backend.core import FinishReason
from multilora_backend.errors import ErrorCode, MultiloraError
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


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def outbox(seen: Seen) -> Iterator[Outbox]:
    outbox = Outbox(seen)
    outbox.start()
    yield outbox
    outbox.close()


@pytest.fixture
def deliver(outbox: Outbox) -> Callable[..., Delivery]:
    """A watched delivery."""

    def make(request_id: int = 1, sender: FakeSender | None = None) -> Delivery:
        delivery = Delivery(request_id, sender or FakeSender(), None, Letters())
        outbox.watch(delivery)
        return delivery

    return make


def say(outbox: Outbox, delivery: Delivery, text: str, last: bool = False) -> None:
    for i, letter in enumerate(text):
        reason = FinishReason.STOP if last and i == len(text) - 1 else None
        outbox.push(delivery, Output(delivery.request_id, 0, [ord(letter)], finish_reason=reason))


class Slow(FakeSender):
    """Its first send takes until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.sending, self.release = threading.Event(), threading.Event()

    def send(self, tensors: dict[str, np.ndarray], final: bool) -> None:
        super().send(tensors, final)
        self.sending.set()
        assert self.release.wait(10)


def test_tokens_that_wait_are_merged_and_keep_their_order(outbox, deliver, seen):
    slow, quick = Slow(), FakeSender()
    one, two = deliver(1, slow), deliver(2, quick)
    say(outbox, two, "x")
    wait_until(lambda: quick.responses)
    say(outbox, one, "a")
    assert slow.sending.wait(5)
    say(outbox, one, "bcdefg" * 100, last=True)
    say(outbox, two, "yzwv", last=True)
    assert outbox._queue.qsize() < 10, "a place in the queue for each token: memory grows while the sender lags"
    slow.release.set()
    assert slow.wait().text == "a" + "bcdefg" * 100
    assert quick.wait().text == "xyzwv"
    assert [len(s.responses) for s in (slow, quick)] == [2, 2]
    wait_until(lambda: sorted(seen.closed) == [(1, Outcome.FINISHED), (2, Outcome.FINISHED)])


def test_a_thread_that_keeps_up_merges_nothing(outbox, deliver):
    sender = FakeSender()
    delivery = deliver(1, sender)
    for i, letter in enumerate("abcd"):
        say(outbox, delivery, letter, last=letter == "d")
        wait_until(lambda i=i: len(sender.responses) == i + 1)
    assert sender.text == "abcd"


def test_first_tokens_overtake_the_queue(outbox, deliver):
    order: list[int] = []

    class Noting(FakeSender):
        def send(self, tensors, final):
            order.append(len(order) if self is not late_sender else -1)
            super().send(tensors, final)

    late_sender = Noting()
    slow = Slow()
    old = [deliver(i, Noting()) for i in range(10)]
    for delivery in old:
        say(outbox, delivery, "a")
    wait_until(lambda: len(order) == 10)
    blocker = deliver(20, slow)
    say(outbox, blocker, "a")
    assert slow.sending.wait(5)
    for delivery in old:
        say(outbox, delivery, "b")
    late = deliver(30, late_sender)
    say(outbox, late, "c")
    slow.release.set()
    wait_until(lambda: len(order) == 21)
    assert order.index(-1) == 10, "the first token came after the others"


def test_all_calls_are_made_by_one_thread(outbox, deliver):
    senders = [FakeSender() for _ in range(20)]
    deliveries = [deliver(i, sender) for i, sender in enumerate(senders)]

    def feed(part: list[Delivery]) -> None:
        for delivery in part:
            say(outbox, delivery, "hello", last=True)

    threads = [threading.Thread(target=feed, args=(deliveries[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    assert all(sender.wait().text == "hello" for sender in senders)
    assert set.union(*(sender.threads for sender in senders)) == {"outbox"}


def test_a_client_that_left_is_noticed_without_anything_to_send(outbox, deliver, seen):
    sender, other = FakeSender(), FakeSender()
    delivery = deliver(1, sender)
    deliver(2, other)
    wait_until(lambda: sender.asked > 2)
    sender.cancelled = True
    started = time.monotonic()
    assert sender.wait().error is not None
    assert time.monotonic() - started < 2
    assert (sender.error.code, sender.error.message) == (ErrorCode.CANCELLED, "Request was cancelled")
    say(outbox, delivery, "late", last=True)  # FakeSender would complain
    wait_until(lambda: not delivery.incoming)
    assert seen.closed == [(1, Outcome.CANCELLED)]
    asked = other.asked
    wait_until(lambda: other.asked > asked)


def test_questions_get_rarer_with_more_requests(outbox, deliver):
    senders = [FakeSender() for _ in range(400)]
    for i, sender in enumerate(senders):
        deliver(i, sender)
    wait_until(lambda: all(sender.asked for sender in senders))
    before, started = sum(sender.asked for sender in senders), time.monotonic()
    time.sleep(0.5)
    # A question costs tritonserver and us 40 us: a tenth of the thread's time is 2,500 a second.
    assert (sum(sender.asked for sender in senders) - before) / (time.monotonic() - started) < 2750
    senders[123].cancelled = True
    senders[123].wait(2)


def test_a_stop_string_is_reported(outbox, deliver, seen):
    sender = FakeSender()
    say(outbox, deliver(1, sender), "ab!")
    assert sender.wait().text == "ab!"
    assert seen.stopped == [0]


def test_a_bug_in_one_builder_ends_that_request_alone(outbox, deliver, seen):
    bad, good = FakeSender(), FakeSender()
    broken, fine = deliver(1, bad), deliver(2, good)
    say(outbox, broken, "a?")
    say(outbox, fine, "ok", last=True)
    assert bad.wait().error.code is ErrorCode.INTERNAL
    assert "a bug" in bad.error.message
    assert good.wait().text == "ok"
    wait_until(lambda: sorted(seen.closed) == [(1, Outcome.FAILED), (2, Outcome.FINISHED)])


def test_a_sender_that_raises_ends_its_request_alone(outbox, deliver, seen):
    class Broken(FakeSender):
        def send(self, tensors, final):
            raise RuntimeError("shared memory is full")

        fail = send  # not even the error can be sent

        def is_cancelled(self):
            return False

    good = FakeSender()
    broken, fine = deliver(1, Broken()), deliver(2, good)
    say(outbox, broken, "abc")
    say(outbox, fine, "ok", last=True)
    assert good.wait().text == "ok"
    wait_until(lambda: (1, Outcome.FAILED) in seen.closed)
    assert seen.closed.count((1, Outcome.FAILED)) == 1


def test_an_error_ends_a_request_and_a_refused_one_needs_no_builder(outbox, deliver, seen):
    sender, refused = FakeSender(), FakeSender()
    delivery = deliver(1, sender)
    error = MultiloraError(ErrorCode.NOT_FOUND, "no such adapter")
    outbox.push(delivery, error)
    outbox.push(delivery, error)
    outbox.push(Delivery(0, refused), error)
    assert sender.wait().error is error
    assert refused.wait().error is error
    wait_until(lambda: seen.closed == [(1, Outcome.FAILED), (0, Outcome.FAILED)])


def test_closing_sends_what_was_pushed(seen):
    outbox = Outbox(seen)
    sender = FakeSender()
    delivery = Delivery(1, sender, None, Letters())
    say(outbox, delivery, "hello", last=True)
    outbox.start()
    outbox.close()
    assert sender.done.is_set()
    assert sender.text == "hello"
    assert seen.ticks, "the last numbers were not flushed"


def test_a_failing_tick_does_not_stop_the_answers(outbox, deliver, seen):
    def fail() -> None:
        seen.ticks += 1
        raise RuntimeError("metrics")

    seen.on_tick = fail
    wait_until(lambda: seen.ticks > 1)
    sender = FakeSender()
    say(outbox, deliver(1, sender), "ok", last=True)
    assert sender.wait().text == "ok"
