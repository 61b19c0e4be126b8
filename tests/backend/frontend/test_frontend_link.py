# SPDX-License-Identifier: Apache-2.0
"""The link to the engine: one engine for all front ends, and what each of them sees of its deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from frontend_fakes import FakeEngines, wait_until
from multilora_backend.core import SamplingParams
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.engine_process import EngineProcess
from multilora_backend.frontend.link import MAX_MESSAGES, Link
from multilora_backend.frontend.runtime import RuntimeFolder, folder_for
from multilora_backend.processes import Process
from multilora_backend.protocol import Failed, Hello, Output, Ready, Stats, Submit


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.failed: list[Failed] = []
        self.lost: list[str] = []
        self.led: list[bool] = []

    def on_ready(self, ready: Ready) -> None:
        self.card = ready.card

    def on_outputs(self, outputs: list[Output]) -> None:
        self.outputs += outputs

    def on_failed(self, failed: Failed) -> None:
        self.failed.append(failed)

    def on_stats(self, stats: Stats, leads: bool) -> None:
        self.led.append(leads)

    def on_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def tokens(self, request_id: int) -> list[int]:
        return [token for output in self.outputs if output.request_id == request_id for token in output.token_ids]


@pytest.fixture
def engines(tmp_path: Path, make_card) -> FakeEngines:
    return FakeEngines(tmp_path, make_card())


@pytest.fixture
def connect(engines: FakeEngines) -> Iterator[Callable[..., Link]]:
    """A link with a `Heard` as its `heard`; closed after the test."""
    links: list[Link] = []

    def make(environ: dict[str, str] | None = None, **fields: object) -> Link:
        config = engines.config(**fields)
        folder = RuntimeFolder(folder_for(config, "multilora", "1", os.getpid()))
        process = EngineProcess(config, folder, os.getpid(), {**os.environ, **(environ or {})})
        heard = Heard()
        link = Link(process, Hello(f"front-{len(links)}", os.getpid(), os.getpid()), heard)
        link.heard = heard  # type: ignore[attr-defined]
        links.append(link)
        return link

    yield make
    for link in links:
        link.close()
    assert not any(Process.of(pid).alive for pid in engines.pids()), "an engine was left behind"


def submit(link: Link, request_id: int = 1, adapter: str = "", max_tokens: int = 5) -> None:
    link.submit(Submit(request_id, [10, 11, 12], SamplingParams(max_tokens=max_tokens), adapter))


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


def test_front_ends_that_start_together_share_one_engine(connect, engines):
    links = [connect() for _ in range(3)]
    threads = [threading.Thread(target=link.start, args=(20,)) for link in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engines.pids()) == 1
    assert len(engines.heard("Hello")) == 3
    for link in links:  # the same id in each: they must not be mixed up
        submit(link, 1)
    wait_until(lambda: all(len(link.heard.tokens(1)) == 5 for link in links))
    wait_until(lambda: all(link.heard.led for link in links))
    assert sum(link.heard.led[-1] for link in links) == 1


def test_the_engine_outlives_its_starter_and_ends_with_the_last(connect, engines):
    first, second = connect(), connect()
    first.start(20)
    second.start(20)
    first.close()
    [pid] = engines.pids()
    submit(second, 1)
    wait_until(lambda: len(second.heard.tokens(1)) == 5)
    wait_until(lambda: second.heard.led and second.heard.led[-1])
    os.kill(pid, signal.SIGKILL)  # the new leader starts the next one
    wait_until(lambda: len(engines.pids()) == 2 and second.ready)
    second.close()
    assert len(engines.heard("Bye")) == 2
    assert not any(engines.runtime.iterdir()), "the folder was left behind"


def test_an_engine_that_ignores_goodbyes_is_ended(connect, engines, monkeypatch):
    monkeypatch.setattr("multilora_backend.frontend.engine_process._EXIT_WAIT_S", 0.3)
    engines.behave(stay=True)
    link = connect()
    link.start(20)
    link.close()
    assert not Process.of(engines.pids()[0]).alive


FRONT_END = """
import os, sys, time
from multilora_backend.config import Config
from multilora_backend.frontend.service import Service
config = Config.from_json(sys.argv[1])
server = int(sys.argv[2])
service = Service(config, model="multilora", version="1", instance="other", server_pid=server, environ=os.environ)
service.start()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_front_end_takes_its_engine_with_it_but_not_from_others(connect, engines):
    def other() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", FRONT_END, engines.config().to_json(), str(os.getpid())]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    leader = other()
    link = connect()
    link.start(20)
    leader.kill()
    leader.wait()
    wait_until(lambda: link.heard.led and link.heard.led[-1])
    submit(link, 1)
    wait_until(lambda: len(link.heard.tokens(1)) == 5)
    assert len(engines.pids()) == 1
    link.close()

    alone = other()
    alone.kill()
    alone.wait()
    wait_until(lambda: not Process.of(engines.pids()[1]).alive)


@pytest.mark.parametrize(("saved", "expected"), [("/mine", "/mine"), ("", None)])
def test_the_servers_libraries_do_not_reach_the_engine(connect, engines, saved, expected):
    link = connect({"LD_LIBRARY_PATH": "/triton/libs", "MLENGINE_LD_LIBRARY_PATH": saved})
    link.start(20)
    assert engines.heard("Start")[0]["LD_LIBRARY_PATH"] == expected
