# SPDX-License-Identifier: Apache-2.0
"""The link to the engine: what it carries, and what a front end sees of the engine's starts and deaths."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from frontend_fakes import submit, wait_until
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.link import MAX_MESSAGES
from multilora_backend.processes import Process
from multilora_backend.protocol import Output


def test_tokens_come_back(connect, engines):
    link = connect()
    link.start(20)
    assert link.ready
    assert link.heard.card.max_model_len == 64
    submit(link, 7, max_tokens=4)
    wait_until(lambda: len(link.heard.tokens(7)) == 4)
    assert link.heard.tokens(7) == [10, 11, 12, 10]
    submit(link, 8, adapter="missing")
    assert wait_until(lambda: link.heard.failed)[0].code is ErrorCode.NOT_FOUND


def test_an_abort_reaches_the_engine(connect, engines):
    link = connect()
    link.start(20)
    submit(link, 3, adapter="stuck")
    link.abort(3, 0)
    assert wait_until(lambda: engines.heard("Abort")) == [{"type": "Abort", "request_id": 3, "index": 0}]


@pytest.mark.parametrize(
    ("orders", "fields", "words"),
    [
        ({"refuse": "model: /nowhere is not a folder"}, {}, "configuration: model: /nowhere is not a folder"),
        ({"crash": "ImportError: no torch"}, {}, "ended with status 1: ImportError: no torch"),
        ({}, {"engine_python": "/nowhere/python"}, "engine_python: /nowhere/python cannot be run"),
    ],
)
def test_a_first_start_that_fails_says_why(connect, engines, orders, fields, words):
    engines.behave(**orders)
    link = connect(**fields)
    with pytest.raises(MultiloraError, match=words):
        link.start(20)
    assert len(engines.pids()) <= 1, "it was tried again"
    with pytest.raises(MultiloraError):
        submit(link)


def test_an_engine_that_does_not_get_ready_is_ended(connect, engines):
    engines.behave(start_s=60)
    link = connect()
    with pytest.raises(MultiloraError, match=r"engine_start_timeout_s \(0.8 s\)"):
        link.start(0.8)
    started = time.monotonic()
    link.close()
    assert time.monotonic() - started < 4
    [pid] = engines.pids()
    assert not Process.of(pid).alive


def test_after_a_kill_requests_are_lost_then_refused_then_served(connect, engines):
    link = connect()
    link.start(20)
    submit(link, 1, adapter="stuck")
    wait_until(lambda: engines.heard("Submit"))
    engines.behave(start_s=0.5)
    os.kill(engines.pids()[0], signal.SIGKILL)
    wait_until(lambda: link.heard.lost)
    assert link.heard.lost == ["the engine process ended by SIGKILL"]
    with pytest.raises(MultiloraError, match=r"is being started again .*SIGKILL") as caught:
        submit(link, 2)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    wait_until(lambda: link.ready)
    submit(link, 3)
    wait_until(lambda: len(link.heard.tokens(3)) == 5)
    assert not link.heard.tokens(2)
    assert len(engines.pids()) == 2


def test_what_was_submitted_to_a_dead_engine_does_not_reach_the_next(connect, engines):
    engines.behave(step_s=0.0005)
    link = connect()
    link.start(20)
    busy, release, last_words = threading.Event(), threading.Event(), []

    def hold(outputs: list[Output]) -> None:
        busy.set()
        release.wait(10)
        last_words.append(outputs)
        if len(last_words) == MAX_MESSAGES + 2:  # the death is known by now, and is dealt with after these messages
            submit(link, 2)

    link.heard.on_outputs = hold
    submit(link, 1, max_tokens=2000)
    assert busy.wait(5)
    time.sleep(0.4)  # for more messages than are taken in at once
    os.kill(engines.pids()[0], signal.SIGKILL)
    wait_until(lambda: not Process.of(engines.pids()[0]).alive)
    release.set()
    wait_until(lambda: link.heard.lost)
    assert len(last_words) > MAX_MESSAGES + 2
    wait_until(lambda: link.ready)
    submit(link, 3)
    wait_until(lambda: len(engines.heard("Submit")) >= 2)
    assert [message["request_id"] for message in engines.heard("Submit")] == [1, 3]


def test_an_engine_that_keeps_dying_is_tried_ever_more_slowly_and_its_reason_is_told(connect, engines):
    link = connect()
    link.start(20)
    engines.behave(crash="out of memory")
    os.kill(engines.pids()[0], signal.SIGKILL)
    wait_until(lambda: len(engines.pids()) == 3)
    started = time.monotonic()
    wait_until(lambda: len(engines.pids()) == 4)
    assert time.monotonic() - started > 0.3
    with pytest.raises(MultiloraError, match="out of memory"):
        submit(link)
    engines.behave()
    wait_until(lambda: link.ready)
    assert len(link.heard.lost) == 1, "only the first engine had requests to lose"
