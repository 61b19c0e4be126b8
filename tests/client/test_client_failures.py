# SPDX-License-Identifier: Apache-2.0
"""Both clients over both protocols against a fake Triton: errors, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import gc

import pytest

from multilora_client import (
    AdapterNotFound,
    AsyncClient,
    Client,
    InvalidRequest,
    NotFound,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)


@pytest.mark.parametrize(
    ("code", "text", "expected", "tokens_before"),
    [
        ("INVALID_ARGUMENT", "top_p: must be in (0, 1], got 3.0", InvalidRequest, 0),
        ("NOT_FOUND", "LoRA x is not supported, we currently support ['é']", AdapterNotFound, 0),
        ("UNAVAILABLE", "unavailable: the engine restarts", ServerUnavailable, 0),
        ("UNAVAILABLE", "unavailable: the engine restarts", ServerUnavailable, 2),
        ("CANCELLED", "Request was cancelled", RequestCancelled, 2),
        ("INTERNAL", "internal error: out of luck", ServerError, 0),
        ("INTERNAL", "internal error: out of luck", ServerError, 2),
        ("INTERNAL", "text of no known kind", ServerError, 2),
    ],
)
def test_a_models_error_has_its_class_and_its_text(connect, fake, steps, code, text, expected, tokens_before):
    fake.play([*[steps.reply("a")] * tokens_before, steps.fail(code, text)])
    with pytest.raises(expected) as raised:
        connect(retries=0).stream("hello", "x")
    assert raised.type is expected
    assert raised.value.message == text


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        ("NOT_FOUND", "Request for unknown model: 'multilora' is not found", NotFound),
        ("INVALID_ARGUMENT", "unexpected shape for input 'text_input'. Expected [1], got [2]. ", InvalidRequest),
        ("UNAVAILABLE", "Request for unknown model: 'm' version 1 is not at ready state", ServerUnavailable),
        ("INTERNAL", "Failed to process the request(s) for model 'm', message: KeyError", ServerError),
    ],
)
def test_tritons_own_error_without_a_code(connect, fake, steps, code, text, expected):
    fake.play([steps.fail(code, text, refused=True)])
    with pytest.raises(expected) as raised:
        connect(retries=0).generate("hello", "x")
    assert raised.type is expected


@pytest.mark.parametrize("protocol", ["grpc"])
def test_grpc_asks_for_errors_as_text(connect, fake, steps):
    """Streams that end in statuses made tritonserver 2.51 abort; the text tells the class."""
    for text, expected in (("unavailable: x", ServerUnavailable), ("internal: x", ServerError), ("x", InvalidRequest)):
        fake.play([steps.fail("INTERNAL", text)])
        with pytest.raises(expected):
            connect(retries=0).generate("hello")
        assert "triton_grpc_error" not in fake.received[-1]["headers"]


def test_text_quoted_in_an_error_does_not_choose_its_class(connect, fake, steps):
    fake.play([steps.fail("INVALID_ARGUMENT", 'stop: must not be empty, got ["unavailable", "internal"]')])
    with pytest.raises(InvalidRequest):
        connect().generate("hello")
    assert len(fake.received) == 1


def test_deadline_cancels_on_the_server(connect, fake, steps, stopwatch):
    fake.play([steps.hang])
    with pytest.raises(RequestTimeout, match=r"within 1 s"):
        connect().generate("hello", "late", timeout=1.0)
    assert fake.expect_cancelled() == "late"
    assert 1.0 <= stopwatch() < 4


def test_deadline_holds_for_the_whole_stream(connect, fake, steps, stopwatch):
    fake.play([steps.reply("a"), steps.hang])
    with pytest.raises(RequestTimeout):
        connect(timeout=1.0).stream("hello", "late")
    assert fake.expect_cancelled() == "late"
    assert 1.0 <= stopwatch() < 4


def test_deadline_holds_while_tokens_arrive(connect, fake, steps, stopwatch):
    fake.play([steps.reply("a"), steps.pause(0.1)] * 40)
    with pytest.raises(RequestTimeout):
        connect(timeout=1.0).stream("hello")
    assert 1.0 <= stopwatch() < 3


def test_leaving_the_loop_cancels_on_the_server(connect, fake, steps, stopwatch):
    fake.play([steps.reply("a"), steps.reply("b"), steps.hang])
    gc.disable()
    try:
        connect().break_after(2, "hello", "left")
        assert fake.expect_cancelled() == "left"
    finally:
        gc.enable()
    assert stopwatch() < 4


@pytest.mark.parametrize("first", [[], ["a"]])
def test_closing_elsewhere_ends_the_wait_and_the_request(connect, fake, steps, first, stopwatch):
    fake.play([*map(steps.reply, first), steps.hang])
    with pytest.raises(RequestCancelled, match="by this client"):
        connect().close_elsewhere(0.2, "hello", "closed")
    assert fake.expect_cancelled() == "closed"
    assert stopwatch() < 4


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_cancelling_the_task_cancels_on_the_server(fake, protocol, steps, method):
    fake.play([steps.hang])

    async def run():
        async with AsyncClient(fake.urls[protocol], protocol=protocol) as client:
            if method == "generate":
                task = asyncio.create_task(client.generate("hello", "task"))
            else:
                task = asyncio.create_task(client.stream("hello", "task").completion())
            while not fake.received:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await asyncio.to_thread(fake.expect_cancelled)

    assert asyncio.run(run()) == "task"


def test_an_error_in_the_loops_body_cancels_and_the_stream_stays_ended(fake, protocol, steps):
    fake.play([steps.reply("a"), steps.hang])
    with Client(fake.urls[protocol], protocol=protocol) as client:
        stream = client.stream("hello", "body")

        def use():
            with stream:
                raise ZeroDivisionError(next(stream).text)

        with pytest.raises(ZeroDivisionError, match=r"^a$"):
            use()
        assert fake.expect_cancelled() == "body"
        assert list(stream) == []
        assert stream.completion().text == "a"


def test_closing_the_client_ends_its_streams(fake, protocol, steps):
    fake.play([steps.reply("a"), steps.hang])
    client = Client(fake.urls[protocol], protocol=protocol)
    stream = client.stream("hello", "shut")
    assert next(stream).text == "a"
    client.close()
    assert fake.expect_cancelled() == "shut"
    with pytest.raises(RequestCancelled):
        next(stream)


def test_not_http_at_all_is_one_clear_error(fake):
    with (
        Client(fake.urls["grpc"], protocol="http", retries=0) as client,
        pytest.raises((ServerError, ServerUnavailable)),
    ):
        client.generate("hello")
