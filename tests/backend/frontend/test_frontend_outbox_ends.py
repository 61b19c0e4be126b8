# SPDX-License-Identifier: Apache-2.0
"""How requests end in the sending thread, and that one request's trouble stays its own."""

from __future__ import annotations

from frontend_fakes import FakeSender, wait_until
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.outbox import Delivery, Outbox, Outcome
from outbox_bench import Letters, say


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
