# SPDX-License-Identifier: Apache-2.0
"""What stands around a front end in its tests: an engine without a model, and Triton's response senders."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import fake_engine
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.errors import MultiloraError
from multilora_backend.frontend.link import Link
from multilora_backend.protocol import Failed, ModelCard, Output, Ready, Stats, Submit


def wait_until(condition: Callable[[], Any], timeout: float = 10.0) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
    return value


class FakeEngines:
    """The folder from which fake engines take their orders, and what they have heard."""

    def __init__(self, folder: Path, card: ModelCard) -> None:
        self.folder = folder
        (folder / "card").write_bytes(msgspec.msgpack.encode(card))
        self.behave()
        python = folder / "python"
        python.write_text(
            f'#!/bin/sh\nexport FAKE_ENGINE="{folder}"\nexec {sys.executable} {fake_engine.__file__} "$@"\n'
        )
        python.chmod(0o755)
        # Not in the test's own folder, whose path may be longer than a socket's can be.
        self.runtime = Path(tempfile.mkdtemp(prefix="engines-"))
        weakref.finalize(self, shutil.rmtree, self.runtime, ignore_errors=True)

    def config(self, **fields: Any) -> Config:
        defaults = {"model": "m", "engine_python": str(self.folder / "python"), "runtime_dir": str(self.runtime)}
        return Config(**{**defaults, "engine_start_timeout_s": 20.0, **fields})

    def behave(self, **orders: Any) -> None:
        """Orders for the engines that start from now on; see `fake_engine`."""
        (self.folder / "behaviour.json").write_text(json.dumps(orders))

    def heard(self, kind: str) -> list[dict[str, Any]]:
        """The messages of a kind, from all engines so far; "Start" is an engine's beginning."""
        path = self.folder / "heard"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(body) for name, _, body in (line.partition(" ") for line in lines) if name == kind]

    def pids(self) -> list[int]:
        return [start["pid"] for start in self.heard("Start")]


class FakeSender:
    """Triton's response sender of one request. Like the real one, it takes nothing after the final response."""

    def __init__(self, cancelled: bool = False) -> None:
        self.cancelled = cancelled
        self.responses: list[dict[str, np.ndarray]] = []
        self.error: MultiloraError | None = None
        self.done = threading.Event()
        self.threads: set[str] = set()
        self.asked = 0

    def send(self, tensors: dict[str, np.ndarray], final: bool) -> None:
        self._open()
        self.responses.append(tensors)
        if final:
            self.done.set()

    def fail(self, error: MultiloraError) -> None:
        self._open()
        self.error = error
        self.done.set()

    def is_cancelled(self) -> bool:
        self._open()
        self.asked += 1
        return self.cancelled

    def _open(self) -> None:
        self.threads.add(threading.current_thread().name)
        assert not self.done.is_set(), "called after the final response"

    def wait(self, timeout: float = 10.0) -> FakeSender:
        assert self.done.wait(timeout), "no final response came"
        return self

    @property
    def text(self) -> str:
        return b"".join(response["text_output"][0] for response in self.responses).decode()


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


def submit(link: Link, request_id: int = 1, adapter: str = "", max_tokens: int = 5) -> None:
    link.submit(Submit(request_id, [10, 11, 12], SamplingParams(max_tokens=max_tokens), adapter))
