# SPDX-License-Identifier: Apache-2.0
"""The one sending thread: merging, first tokens and ends first, and who is asked whether its client has left."""

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
from outbox_bench import Parted, say


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


class Noting(FakeSender):
    def __init__(self, sent: list[Noting]) -> None:
        super().__init__()
        self.sent = sent

    def send(self, tensors: dict[str, np.ndarray], final: bool) -> None:
        self.sent.append(self)
        super().send(tensors, final)

    def fail(self, error: MultiloraError) -> None:
        self.sent.append(self)
        super().fail(error)


class Lagging:
    """Ten requests whose second tokens wait, one after the other, behind a send that takes until `release`."""

    def __init__(self, outbox: Outbox, deliver: Callable[..., Delivery]) -> None:
        self.order: list[Noting] = []
        self.deliver = deliver
        self.slow = Slow()
        self.deliveries = [self.new(i) for i in range(10)]
        for delivery in self.deliveries:
            say(outbox, delivery, "a")
        wait_until(lambda: len(self.order) == 10)
        say(outbox, deliver(20, self.slow), "a")
        assert self.slow.sending.wait(5)
        for delivery in self.deliveries:
            say(outbox, delivery, "b")
        self.order.clear()

    def new(self, request_id: int) -> Delivery:
        return self.deliver(request_id, Noting(self.order))

    def release(self, sends: int) -> list[int]:
        """Which requests the following sends are of."""
        self.slow.release.set()
        wait_until(lambda: len(self.order) == sends)
        senders = [delivery.sender for delivery in self.deliveries]
        return [senders.index(sender) if sender in senders else -1 for sender in self.order]


@pytest.fixture
def lagging(outbox: Outbox, deliver: Callable[..., Delivery]) -> Iterator[Lagging]:
    lagging = Lagging(outbox, deliver)
    yield lagging
    lagging.slow.release.set()


def test_first_tokens_overtake_the_queue(outbox, lagging):
    say(outbox, lagging.new(30), "c")
    assert lagging.release(11) == [-1, *range(10)]


def test_the_end_of_an_answer_overtakes_the_queue_and_takes_along_what_waits(outbox, lagging):
    last = lagging.deliveries[9]
    say(outbox, last, "cd", last=True)
    assert lagging.release(10) == [9, *range(9)]
    assert last.sender.wait().text == "abcd"


def test_whoever_waits_has_a_turn_however_many_short_answers_there_are(outbox, lagging):
    """Each of them is followed by the next one at once."""
    short: list[FakeSender] = []

    class Next(FakeSender):
        def send(self, tensors: dict[str, np.ndarray], final: bool) -> None:
            super().send(tensors, final)
            short.append(self)
            if len(lagging.order) < 10 and len(short) < 500:
                say(outbox, lagging.deliver(len(short), Next()), "x", last=True)

    say(outbox, lagging.deliver(0, Next()), "x", last=True)
    assert lagging.release(10) == [*range(10)]
    assert 10 <= len(short) < 500


def test_errors_overtake_the_queue(outbox, lagging):
    outbox.push(lagging.deliveries[9], MultiloraError(ErrorCode.INTERNAL, "lost"))
    assert lagging.release(10) == [9, *range(9)]


def test_who_overtakes_is_served_once_more_for_what_comes_later(outbox, lagging):
    """One of n sequences ended: the request keeps its place in the queue, and a place is no token."""
    parted = lagging.deliveries[9]
    parted.builder = Parted()
    outbox.push(parted, Output(9, 0, [ord("c")], finish_reason=FinishReason.STOP))
    assert lagging.release(10) == [9, *range(9)]
    outbox.push(parted, Output(9, 1, [ord("d")]))
    outbox.push(parted, Output(9, 1, [ord("e")], finish_reason=FinishReason.STOP))
    assert parted.sender.wait().text == "abcde"


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


class Asked(FakeSender):
    """A question takes a millisecond, as time is what questions are bounded by."""

    def is_cancelled(self) -> bool:
        time.sleep(0.001)
        return super().is_cancelled()


def test_questions_take_a_tenth_of_the_time_however_many_requests_there_are(outbox, deliver):
    senders = [Asked() for _ in range(100)]
    for i, sender in enumerate(senders):
        deliver(i, sender)
    before, started = sum(sender.asked for sender in senders), time.monotonic()
    time.sleep(1)  # of which a tenth may be spent
    asked, seconds = sum(sender.asked for sender in senders) - before, time.monotonic() - started
    assert 10 < asked <= 100 * seconds + 2, "a hundred a second, and one for the time before"
    senders[12].cancelled = True
    senders[12].wait()


def test_a_lone_client_is_asked_for_every_30_ms(outbox, deliver):
    sender = FakeSender()
    deliver(1, sender)
    started = time.monotonic()
    time.sleep(0.5)
    assert 1 < sender.asked <= (time.monotonic() - started) / 0.03 + 1


def test_clients_are_asked_for_in_turn(outbox, deliver):
    order: list[int] = []

    class Named(FakeSender):
        def is_cancelled(self) -> bool:
            order.append(id(self))
            return super().is_cancelled()

    for i in range(50):
        deliver(i, Named())
    start = len(order)
    wait_until(lambda: len(order) >= start + 150)
    assert len(set(order[start + 50 : start + 100])) == 50
    assert order[start + 50 : start + 100] == order[start + 100 : start + 150]
