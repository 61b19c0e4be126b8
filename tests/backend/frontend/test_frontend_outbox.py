# SPDX-License-Identifier: Apache-2.0
"""The one sending thread: merging, first tokens first, and who is asked whether its client has left."""

from __future__ import annotations

import threading
import time

import numpy as np

from frontend_fakes import FakeSender, wait_until
from multilora_backend.errors import ErrorCode
from multilora_backend.frontend.outbox import Delivery, Outcome
from outbox_bench import say


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
