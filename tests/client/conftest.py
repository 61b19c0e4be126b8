# SPDX-License-Identifier: Apache-2.0
"""Every client test runs over both protocols and with both clients, against a fake Triton."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from client_drivers import AsyncDriver, Connect, SyncDriver
from fake_triton import Drop, Fail, FakeTriton, Hang, Pause, Reply


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    server = FakeTriton()
    server.play([Reply("ok", "stop", final=True)])
    yield server
    server.stop()


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[SyncDriver, AsyncDriver], ids=["sync", "asyncio"])
def connect(request: pytest.FixtureRequest, fake: FakeTriton, protocol: str) -> Iterator[Connect]:
    """Makes a driver of either client for either protocol; `url` defaults to the fake server's."""
    made: list[Any] = []

    def connect_to(url: str | None = None, **arguments: Any) -> Any:
        driver = request.param(url or fake.urls[protocol], protocol, **{"timeout": 8.0, **arguments})
        made.append(driver)
        return driver

    yield connect_to
    for driver in made:
        driver.close()


@pytest.fixture
def steps() -> Any:
    """The words that scripts are made of; a fixture, because test folders are no packages to import from."""

    class Steps:
        reply = Reply
        fail = Fail
        hang = Hang()
        drop = Drop()
        pause = Pause

    return Steps


@pytest.fixture
def stopwatch() -> Callable[[], float]:
    start = time.monotonic()
    return lambda: time.monotonic() - start
