# SPDX-License-Identifier: Apache-2.0
"""Our own client against the real server: the same answers and errors over gRPC and HTTP, sync, asyncio and shell."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from multilora_client import AsyncClient, Client, InvalidRequest, NotFound, RequestTimeout, ServerUnavailable
from tiny.tasks import BASE, TASKS

GREEDY = {"temperature": 0.0, "max_tokens": 32}
PROTOCOLS = ("grpc", "http")


def url(server, protocol: str) -> str:
    return server.grpc if protocol == "grpc" else server.http


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sync(server, protocol: str):
    with Client(url(server, protocol), protocol=protocol) as client:
        assert client.ready()
        for name in TASKS:
            adapter = None if name == BASE else name
            completion = client.generate("client", adapter=adapter, **GREEDY)
            assert completion.text == TASKS[name]("client")
            assert completion.finish_reason == "stop"
            assert (
                "".join(chunk.text for chunk in client.stream("client", adapter=adapter, **GREEDY)) == completion.text
            )
        message = {"role": "user", "content": "client"}
        assert client.chat([message], adapter="upper", **GREEDY).text == "CLIENT"
        with pytest.raises((InvalidRequest, NotFound), match="LoRA nobody is not supported"):
            client.generate("client", adapter="nobody", **GREEDY)
        with pytest.raises(InvalidRequest, match="top_p"):
            client.generate("client", top_p=7.0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_async_mixes_adapters(server, protocol: str):
    async def run() -> list[str]:
        async with AsyncClient(url(server, protocol), protocol=protocol) as client:
            calls = [client.generate("client", adapter=None if n == BASE else n, **GREEDY) for n in TASKS] * 1
            return [completion.text for completion in await asyncio.gather(*calls)]

    assert asyncio.run(run()) == [task("client") for task in TASKS.values()]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_deadline_and_a_stream_left_early_cancel_on_the_server(server, metrics, protocol: str):
    endless = {"temperature": 0.0, "max_tokens": 480, "ignore_eos": True}
    m = metrics(server)
    with Client(url(server, protocol), protocol=protocol) as client:
        for _ in client.stream("client", adapter="upper", **endless):
            break
        m.wait("vllm:num_requests_running", 0)
        started = time.monotonic()
        with pytest.raises(RequestTimeout):
            client.generate("client", adapter="upper", timeout=0.15, n=16, **endless)
        assert time.monotonic() - started < 4
        m.wait("vllm:num_requests_running", 0)


def test_nobody_there():
    with Client("127.0.0.1:9", retries=0) as client, pytest.raises(ServerUnavailable):
        client.generate("client")


def shell(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "multilora_client.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_command_line(server):
    options = ["--temperature", "0", "--max-tokens", "32", "--url", server.grpc]
    assert shell("ready", "--url", server.grpc).returncode == 0
    assert shell("generate", "shell", "--adapter", "rot13", *options).stdout.strip() == "furyy"
    assert shell("chat", "shell", "--adapter", "double", *options).stdout.strip() == "sshheellll"
    compared = shell("compare", "shell", "--adapters", "base,upper,sort", *options)
    assert compared.returncode == 0, compared.stderr
    for expected in ("shell", "SHELL", "ehlls"):
        assert expected in compared.stdout
    refused = shell("generate", "shell", "--adapter", "nobody", *options)
    assert refused.returncode != 0
    assert "LoRA nobody is not supported" in refused.stderr
