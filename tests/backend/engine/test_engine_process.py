# SPDX-License-Identifier: Apache-2.0
"""The engine as a process: it answers over its socket, names its start errors, and never outlives its front ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

import tiny_models
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.protocol import (
    Abort,
    AdapterCommand,
    Bye,
    Failed,
    Hello,
    Outputs,
    Ready,
    Stats,
    Submit,
    encoder,
    engine_decoder,
)

START_S = 60
LEAVES_S = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("model"))


class Process:
    """An engine process and one front end's socket to it."""

    def __init__(self, tmp_path: Path, config: Config, parent: int = 0, server: int = 0) -> None:
        (tmp_path / "config.json").write_text(config.to_json())
        self.address = f"ipc://{tmp_path}/engine.sock"
        command = [sys.executable, "-m", "multilora_backend.engine", "--address", self.address]
        command += ["--config", f"{tmp_path}/config.json", "--parent", str(parent), "--server", str(server)]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.socket = self.connect()

    def connect(self) -> zmq.Socket:
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self.address)
        return socket

    def hello(self, name: str = "front", pid: int = 0, socket: zmq.Socket | None = None) -> Ready:
        socket = socket or self.socket
        socket.send(encoder.encode(Hello(name, pid or os.getpid(), os.getpid())))
        return self.receive(Ready, socket)

    def receive(self, kind: type | tuple[type, ...], socket: zmq.Socket | None = None):
        """The next message of a kind; others are dropped."""
        socket = socket or self.socket
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if socket.poll(100):
                message = engine_decoder.decode(socket.recv())
                if isinstance(message, kind):
                    return message
            assert self.popen.poll() is None, self.popen.stderr.read()
        raise AssertionError(f"no {kind} came")

    def send(self, *messages) -> None:
        for message in messages:
            self.socket.send(encoder.encode(message))


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    started: list[Process] = []

    def start(config: Config, **kwargs) -> Process:
        started.append(Process(tmp_path, config, **kwargs))
        return started[-1]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait()
        process.socket.close()


def sleeper() -> subprocess.Popen:
    return subprocess.Popen(["sleep", "300"])


def test_requests_errors_commands_and_the_last_goodbye(start, model: Path):
    process = start(Config(model=str(model), device="cpu", max_model_len=40, **tiny_models.ROOM))
    administration = process.connect()
    administration.send(encoder.encode(Hello("admin", os.getpid(), os.getpid(), serves=False)))
    process.receive(Ready, administration)
    administration.send(encoder.encode(AdapterCommand(1, "reload")))
    assert process.receive(Failed, administration).message.startswith("action: is not known")
    process.popen.send_signal(signal.SIGINT)  # which is left to the front ends
    ready = process.hello()
    assert ready.pid == process.popen.pid
    assert (ready.card.max_model_len, ready.card.vocab_size, ready.card.lora_enabled) == (40, 61, False)
    forever = SamplingParams(max_tokens=30, ignore_eos=True)
    process.send(Submit(1, [3, 4], forever), Submit(2, [5] * 40, forever), Abort(77))
    process.socket.send(b"\xc1 this is no message")
    assert process.receive(Failed).request_id == 2
    assert process.receive(Outputs).items[0].request_id == 1
    assert process.receive(Stats).max_loras == 0
    assert administration.poll(500) == 0, "statistics are for those that serve"
    process.send(Bye())
    assert process.popen.wait(LEAVES_S) == 0, "one that only administers keeps no engine alive"
    administration.close()


def test_a_burst_of_messages_does_not_stop_what_runs(start, model: Path):
    engine = start(Config(model=str(model), device="cpu", **tiny_models.ROOM))
    engine.hello()
    engine.send(Submit(0, [5, 6], SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)))
    engine.receive(Outputs)
    refused = [encoder.encode(Submit(number, [61], SamplingParams())) for number in range(1, 9001)]
    for frame in refused:
        engine.socket.send(frame)
    answers, tokens = 0, 0
    while answers < len(refused):
        match engine.receive((Failed, Outputs)):
            case Failed():
                answers += 1
            case Outputs() if answers:
                tokens += 1
    assert tokens >= 5, "some 200 ms of refusals, at most 5 at a time"


def test_front_ends_that_die_or_outlive_their_server(start, model: Path):
    """One of two front ends dies with a request in flight: the engine serves the other. When that one's server dies,
    it may hang in a call to it, so it is not asked but ended, and the engine leaves with it."""
    process = start(Config(model=str(model), device="cpu", **tiny_models.ROOM), parent=os.getpid())
    first, second, server = sleeper(), sleeper(), sleeper()
    process.hello("first", first.pid)
    other = process.connect()
    other.send(encoder.encode(Hello("second", second.pid, server.pid)))
    process.receive(Ready, other)
    process.send(Submit(1, [3], SamplingParams(max_tokens=120, ignore_eos=True)))
    first.kill()  # a zombie until it is waited for: that is as dead as it gets
    while process.receive(Stats, other).num_running:
        pass
    assert process.popen.poll() is None
    assert second.poll() is None
    server.kill()
    assert second.wait(LEAVES_S) == -signal.SIGKILL
    assert process.popen.wait(LEAVES_S) == 0
    first.wait()
    server.wait()
    other.close()


@pytest.mark.parametrize("who", ["parent", "server"])
def test_an_engine_whose_launcher_dies_before_hello_leaves(start, model: Path, who: str):
    launcher = sleeper()
    process = start(Config(model=str(model), device="cpu", **tiny_models.ROOM), **{who: launcher.pid})
    launcher.kill()
    launcher.wait()
    assert process.popen.wait(START_S) in (0, 3)


def test_a_start_that_cannot_work_says_why_and_exits_with_2(start, tmp_path: Path):
    process = start(Config(model=str(tmp_path / "nowhere")))
    _, stderr = process.popen.communicate(timeout=START_S)
    assert process.popen.returncode == 2
    assert stderr.strip().splitlines()[-1] == f"multilora engine: model: {tmp_path}/nowhere holds no config.json"
