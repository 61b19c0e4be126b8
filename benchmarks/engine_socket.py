# SPDX-License-Identifier: Apache-2.0
"""An engine process without Triton, behind the socket that front ends use: what the whole server is compared with."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import zmq
from traffic import Record, Request, Traffic

from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.protocol import Bye, Failed, Hello, Outputs, Ready, Submit, encoder, engine_decoder

START_TIMEOUT_S = 600.0
ALIVE_POLL_S = 1.0


class EngineSocket:
    def __init__(self, socket: zmq.Socket[bytes], ready: Ready, process: subprocess.Popen[bytes]) -> None:
        self._socket = socket
        self._process = process
        self.card = ready.card

    def send(self, request_id: int, prompt: list[int], sampling: SamplingParams, adapter: str) -> None:
        self._socket.send(encoder.encode(Submit(request_id, prompt, sampling, adapter)))

    def receive(self, timeout_s: float | None = None) -> Outputs | None:
        """The next tokens; None after `timeout_s`. Raises RuntimeError if a request failed or the engine died."""
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = max(0.0, min(ALIVE_POLL_S, deadline - time.monotonic()))
            if self._socket.poll(math.ceil(1e3 * left)):
                message = engine_decoder.decode(self._socket.recv())
                if isinstance(message, Failed):
                    raise RuntimeError(message.message)
                if isinstance(message, Outputs):
                    return message
            elif time.monotonic() >= deadline:
                return None
            elif self._process.poll() is not None:
                raise RuntimeError("the engine process ended; its output says why")

    def run(self, traffic: Traffic, prompts: Sequence[list[int]], ignore_eos: bool = True) -> list[Record]:
        """The traffic's requests, `prompts` being their tokens: what comes before the engine is not measured here."""
        sampling = SamplingParams(temperature=0.0, max_tokens=traffic.output, ignore_eos=ignore_eos)
        records: dict[int, Record] = {}
        started = time.monotonic()
        following, running = 0, 0
        while following < len(prompts) or running:
            while following < len(prompts) and traffic.may_start(following, running, time.monotonic() - started):
                request: Request = traffic.requests[following]
                records[following] = Record(time.monotonic())
                self.send(following, prompts[following], sampling, request.adapter)
                following, running = following + 1, running + 1
            message = self.receive(traffic.wait_s(following, time.monotonic() - started))
            now = time.monotonic()
            for item in message.items if message else ():
                records[item.request_id].take(now, len(item.token_ids))
                running -= item.finish_reason is not None
        return list(records.values())


@contextmanager
def engine_process(config: Config, python: str = sys.executable) -> Iterator[EngineSocket]:
    """Starts an engine and ends it. Raises RuntimeError if it ends before it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(config.to_json())
        address = f"ipc://{folder}/engine.sock"
        command = [python, "-m", "multilora_backend.engine", "--address", address]
        process = subprocess.Popen([*command, "--config", f"{folder}/config.json", "--parent", str(os.getpid())])
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        try:
            socket.connect(address)
            socket.send(encoder.encode(Hello("benchmark", os.getpid(), os.getpid())))
            deadline = time.monotonic() + START_TIMEOUT_S
            while not socket.poll(200):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the engine process does not become ready; its output says why")
            ready = engine_decoder.decode(socket.recv())
            if not isinstance(ready, Ready):
                raise RuntimeError(f"the engine answered {type(ready).__name__}, not Ready")
            yield EngineSocket(socket, ready, process)
            socket.send(encoder.encode(Bye()))
            process.wait(30)
        finally:
            process.kill()
            process.wait()
            socket.close(linger=0)
