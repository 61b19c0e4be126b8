# SPDX-License-Identifier: Apache-2.0
"""Both clients over both protocols against a fake Triton: what is tried again, and what never is."""

from __future__ import annotations

import socket
import threading

import pytest

from multilora_client import (
    InvalidRequest,
    NotFound,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)


@pytest.fixture
def closed_port():
    """A port on which nobody listens, held so that nobody will."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_unavailable_is_tried_again_before_the_first_token(connect, fake, steps):
    busy = steps.fail("UNAVAILABLE", "unavailable: full")
    fake.play([busy], [busy], [steps.reply("ok", "stop", final=True)])
    assert connect().generate("hello").text == "ok"
    assert len(fake.received) == 3


@pytest.mark.parametrize("retries", [0, 1])
def test_retries_are_bounded(connect, fake, steps, retries):
    fake.play([steps.fail("UNAVAILABLE", "unavailable: full")])
    with pytest.raises(ServerUnavailable, match="full"):
        connect(retries=retries).generate("hello")
    assert len(fake.received) == 1 + retries


def test_never_tried_again_after_a_token(connect, fake, steps):
    fake.play([steps.reply("a"), steps.fail("UNAVAILABLE", "unavailable: gone")])
    with pytest.raises(ServerUnavailable):
        connect().stream("hello")
    assert len(fake.received) == 1


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("INVALID_ARGUMENT", "n: must be at least 1"),
        ("NOT_FOUND", "LoRA x is not supported, we currently support []"),
        ("INTERNAL", "internal error"),
        ("CANCELLED", "Request was cancelled"),
    ],
)
def test_other_errors_are_not_tried_again(connect, fake, steps, code, text):
    fake.play([steps.fail(code, text)])
    with pytest.raises((InvalidRequest, NotFound, ServerError, RequestCancelled)):
        connect().generate("hello")
    assert len(fake.received) == 1


@pytest.mark.parametrize("protocol", ["http"])
def test_a_broken_connection_is_tried_again_only_before_the_first_token(connect, fake, steps):
    client = connect()
    fake.play([steps.drop], [steps.reply("ok", "stop", final=True)])
    assert client.generate("hello").text == "ok"
    fake.play([steps.reply("a"), steps.drop])
    with pytest.raises(ServerUnavailable):
        client.generate("hello")
    assert len(fake.received) == 3


def test_nobody_listens(connect, closed_port, stopwatch):
    with pytest.raises(ServerUnavailable):
        connect(f"127.0.0.1:{closed_port}").generate("hello")
    # Two retries wait at least 0.05 + 0.1 s.
    assert 0.15 <= stopwatch() < 4


def test_the_deadline_includes_retries(connect, closed_port, stopwatch):
    with pytest.raises((ServerUnavailable, RequestTimeout)):
        connect(f"127.0.0.1:{closed_port}", retries=1000, timeout=0.5).generate("hello")
    assert stopwatch() < 4


def test_a_server_that_comes_back_is_found(connect, fake, steps, protocol):
    """A gRPC channel that has failed refuses for a second without looking; retries must really try."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"127.0.0.1:{port}" if protocol == "grpc" else f"127.0.0.2:{port}"
    client = connect(url, retries=4)
    started = []

    def start_server():
        server = type(fake)(port)
        server.play([steps.reply("back", "stop", final=True)])
        started.append(server)

    timer = threading.Timer(0.1, start_server)
    timer.start()
    try:
        # Four retries wait 0.1 + 0.2 + 0.4 + 0.8 s at most, and half of that at least.
        assert client.generate("hello").text == "back"
    finally:
        timer.join()
        for server in started:
            server.stop()
