# SPDX-License-Identifier: Apache-2.0
"""A whole front end against an engine without a model: the life of a request, good and bad, without Triton."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from frontend_fakes import FakeEngines, FakeSender, wait_until
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend import service as service_module
from multilora_backend.frontend.request import RawRequest
from multilora_backend.frontend.service import Service


@pytest.fixture
def service(engines: FakeEngines) -> Iterator[Service]:
    service = start(engines)
    yield service
    service.close()


def start(engines: FakeEngines, instance: str = "front", **fields: object) -> Service:
    config = engines.config(**fields)
    service = Service(
        config, model="multilora", version="1", instance=instance, server_pid=os.getpid(), environ=os.environ
    )
    service.start()
    return service


@pytest.fixture
def ask(service: Service) -> Callable[..., FakeSender]:
    return lambda text, **options: send(service, text, **options)


def send(service: Service, text: str, stream: bool = False, **parameters: object) -> FakeSender:
    """Sends a request that does not echo its prompt; the engine answers with the prompt's tokens again and again."""
    sender = FakeSender()
    tensors = {"text_input": np.array([text.encode()], dtype=object), "stream": np.array([stream])}
    if not stream:
        tensors["exclude_input_in_output"] = np.array([True])
    service.handle(RawRequest(tensors, parameters), sender)
    return sender


def test_a_request_gets_one_answer_and_a_stream_many(ask):
    whole = ask("zyx", max_tokens=9).wait()
    stream = ask("zyx", stream=True, max_tokens=9).wait()
    assert whole.error is stream.error is None
    assert len(whole.responses) == 1
    assert whole.text.startswith("zyx")
    assert stream.text == whole.text
    assert len(stream.responses) > 1


def test_many_requests_at_once_get_their_own_answers(ask, service):
    texts = [f"{i:02d} naïve 你好" for i in range(60)]
    senders = [ask(text, stream=i % 2 == 0, max_tokens=30) for i, text in enumerate(texts)]
    for text, sender in zip(texts, senders, strict=True):
        assert sender.wait().text.startswith(text)
    wait_until(lambda: not service._in_flight)


def test_bad_requests_are_refused_and_disturb_nobody(ask, engines):
    good = ask("abc", stream=True, max_tokens=40)
    bad = {
        "max_tokens": ask("abc", max_tokens=-1),
        "lora_name": ask("abc", lora_name="../etc"),
        "unknown key": ask("abc", nonsense=1),
        "text_input": ask(""),
    }
    for words, sender in bad.items():
        error = sender.wait().error
        assert error.code is ErrorCode.INVALID_ARG
        assert words in error.message
    assert good.wait().error is None
    assert len(engines.heard("Submit")) == 1


def test_what_the_engine_refuses_ends_with_its_code(ask, service):
    error = ask("abc", lora_name="missing").wait().error
    assert (error.code, error.message) == (ErrorCode.NOT_FOUND, "LoRA missing is not supported")
    wait_until(lambda: not service._in_flight)


def test_a_cancelled_request_is_aborted_in_the_engine(ask, engines, service):
    sender = ask("abc", stream=True, lora_name="stuck", max_tokens=50)
    [submit] = wait_until(lambda: engines.heard("Submit"))
    sender.cancelled = True
    assert sender.wait().error.code is ErrorCode.CANCELLED
    [abort] = wait_until(lambda: engines.heard("Abort"))
    assert (abort["request_id"], abort["index"]) == (submit["request_id"], -1)
    assert not service._in_flight


def test_a_stop_string_ends_the_sequence_in_the_engine_too(service, engines):
    tensors = {
        "text_input": np.array([b"abcdef"], dtype=object),
        "exclude_input_in_output": np.array([True]),
        "sampling_parameters": np.array([b'{"stop": ["d"], "max_tokens": 60, "n": 2}'], dtype=object),
    }
    sender = FakeSender()
    service.handle(RawRequest(tensors, {}), sender)
    sender.wait()
    assert [value.decode() for value in sender.responses[0]["text_output"]] == ["abc", "abc"]
    aborted = wait_until(lambda: len(engines.heard("Abort")) == 2 and engines.heard("Abort"))
    assert sorted(abort["index"] for abort in aborted) == [0, 1]


def test_when_the_engine_dies_nobody_is_left_hanging(ask, engines, service):
    lost = [ask("abc", stream=stream, lora_name="stuck") for stream in (True, False)]
    wait_until(lambda: len(engines.heard("Submit")) == 2)
    engines.behave(start_s=1.5)
    os.kill(engines.pids()[0], signal.SIGKILL)
    for sender in lost:
        error = sender.wait(10).error
        assert error.code is ErrorCode.INTERNAL
        assert "SIGKILL" in error.message
        assert "please" in error.message
    assert not service.ready
    started = time.monotonic()
    error = ask("abc").wait().error
    assert error.code is ErrorCode.UNAVAILABLE
    assert time.monotonic() - started < 1, "it must fail fast"
    wait_until(lambda: service.ready)
    assert ask("abc", max_tokens=9).wait().text.startswith("abc")


def test_a_request_that_kills_the_engine_is_answered(ask):
    assert ask("abc", lora_name="crash").wait(3).error.code is ErrorCode.INTERNAL


def test_a_long_prompt_does_not_hold_up_a_short_one(ask, monkeypatch):
    parse = service_module.parse

    answered = threading.Event()

    def slow(raw, *rest):
        if len(raw.tensors["text_input"][0]) > 1000:
            assert answered.wait(30), "the short one waits for the long one"
        return parse(raw, *rest)

    monkeypatch.setattr(service_module, "parse", slow)
    long = ask("x" * 20_000)
    short = ask("abc", max_tokens=3).wait()
    assert short.error is None
    answered.set()
    assert "text_input" in long.wait().error.message


def test_a_bug_while_parsing_is_answered(ask, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(service_module, "parse", broken)
    error = ask("abc").wait().error
    assert error.code is ErrorCode.INTERNAL
    assert "a bug" in error.message


def test_two_front_ends_answer_their_own_requests(engines, service):
    other = start(engines, "other")
    try:
        senders = [send((service, other)[i % 2], f"{i:03d}", stream=True, max_tokens=12) for i in range(40)]
        for i, sender in enumerate(senders):
            assert sender.wait().text.startswith(f"{i:03d}")
        assert len(engines.pids()) == 1
    finally:
        other.close()


def test_closing_lets_requests_finish_and_fails_those_that_do_not(engines, monkeypatch):
    monkeypatch.setattr(service_module, "DRAIN_S", 0.6)
    engines.behave(step_s=0.02)
    service = start(engines)
    finishing = send(service, "abc", stream=True, max_tokens=12)
    stuck = send(service, "abc", lora_name="stuck")
    wait_until(lambda: len(engines.heard("Submit")) == 2)
    service.close()
    assert finishing.wait(0).error is None
    assert stuck.wait(0).error.code is ErrorCode.UNAVAILABLE
    assert not service.ready
    service.close()


def test_a_service_that_cannot_start_leaves_nothing(engines):
    engines.behave(refuse="adapters: /nowhere does not exist")
    with pytest.raises(MultiloraError, match="adapters: /nowhere does not exist"):
        start(engines)
    assert not any(engines.runtime.iterdir())
