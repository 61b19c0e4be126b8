# SPDX-License-Identifier: Apache-2.0
"""The model multilora_adapters without Triton: commands in, JSON out, to the engine of the model that is served.

It attaches to that engine as one more front end. It never starts one, never keeps one alive, and answers UNAVAILABLE
while there is none, so that it loads at once and in any order.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
from collections.abc import Mapping
from queue import SimpleQueue

import numpy as np

from multilora_backend.config import ENV_PREFIX, TRITON_PARAMETERS, Config
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.frontend.attachment import AttachedEngine
from multilora_backend.frontend.commands import parse
from multilora_backend.frontend.link import Link
from multilora_backend.frontend.listener import Listener
from multilora_backend.frontend.outbox import Sender
from multilora_backend.protocol import AdapterReply, Failed, Hello, Ready

log = logging.getLogger(__name__)

MODEL = "multilora"
MAX_COMMANDS = 256
"""In flight; one more is answered UNAVAILABLE."""


_SHARED = ("runtime_dir", "tenant_header", "priority_header", "log_level")
"""Settings of the served model that matter here."""


def settings(parameters: Mapping[str, str], environ: Mapping[str, str]) -> tuple[str, Config]:
    """The served model's name and what of its configuration matters here, from config.pbtxt and the environment.

    Raises MultiloraError for a parameter that is none.
    """
    values = {key: value for key, value in parameters.items() if key not in TRITON_PARAMETERS}
    serves = values.pop("serves", MODEL)
    unknown = sorted(set(values) - set(_SHARED))
    if unknown:
        raise invalid("config.pbtxt parameters", f"unknown key {', '.join(map(repr, unknown))}")
    for name in _SHARED:
        if (value := environ.get(f"{ENV_PREFIX}{name.upper()}")) is not None:
            values[name] = value
    return serves, Config.from_mapping(values, "config.pbtxt parameters")


class Administration(Listener):
    """Threads: Triton's calls `handle`; the link's hears the engine; one of our own answers, as `outbox` has it."""

    def __init__(self, *, serves: str, config: Config, instance: str, server_pid: int) -> None:
        """`serves` is the Triton model whose adapters these are; `config` comes from `settings`."""
        self._serves = serves
        self._config = config
        self._lock = threading.Lock()
        self._in_flight: dict[int, Sender] = {}
        self._request_ids = itertools.count(1)
        self._last_words = ""
        self._answers: SimpleQueue[tuple[Sender, dict | MultiloraError] | None] = SimpleQueue()
        self._answering = threading.Thread(target=self._answer, name="answers", daemon=True)
        hello = Hello(f"{instance}-{os.getpid()}", os.getpid(), server_pid, serves=False)
        self._link = Link(AttachedEngine(config.runtime_dir, serves, server_pid), hello, self)

    @property
    def ready(self) -> bool:
        """Whether a command sent now would reach an engine."""
        return self._link.ready

    def start(self) -> None:
        """Returns at once; the engine is looked for from now on."""
        self._answering.start()
        self._link.begin()

    def handle(self, tensors: Mapping[str, np.ndarray], parameters: Mapping[str, object], sender: Sender) -> None:
        """Takes a command. Never raises and never waits: whatever is wrong with it is told to its sender."""
        request_id = next(self._request_ids)
        try:
            command = parse(request_id, tensors, parameters, self._config)
            self._register(request_id, sender)
        except MultiloraError as error:
            self.refuse(sender, error)
            return
        except Exception as error:  # a bug in parsing must not cost the operator an answer
            log.exception("a command could not be read")
            self.refuse(sender, MultiloraError(ErrorCode.INTERNAL, f"the command could not be read: {error}"))
            return
        try:
            self._link.submit(command)
        except MultiloraError:
            why = f" ({self._last_words})" if self._last_words else ""
            self._settle(request_id, self._unavailable(f"the engine of model {self._serves} is not there{why}"))

    def refuse(self, sender: Sender, error: MultiloraError) -> None:
        self._answers.put((sender, error))

    def close(self) -> None:
        self._link.close()
        self._fail_all(MultiloraError(ErrorCode.UNAVAILABLE, "the model is being unloaded"))
        self._answers.put(None)
        if self._answering.is_alive():
            self._answering.join()

    def on_ready(self, ready: Ready) -> None:
        self._last_words = ""

    def on_reply(self, reply: AdapterReply) -> None:
        self._settle(reply.request_id, reply.result)

    def on_failed(self, failed: Failed) -> None:
        self._settle(failed.request_id, MultiloraError(failed.code, failed.message))

    def on_lost(self, reason: str) -> None:
        # Commands are idempotent, so whoever retries does no harm whether or not this one was carried out.
        self._last_words = reason
        self._fail_all(self._unavailable(f"{reason} before the command was answered"))

    def _register(self, request_id: int, sender: Sender) -> None:
        with self._lock:
            if len(self._in_flight) >= MAX_COMMANDS:
                raise self._unavailable(f"{MAX_COMMANDS} commands are in flight, which is the limit")
            self._in_flight[request_id] = sender

    def _settle(self, request_id: int, answer: dict | MultiloraError) -> None:
        with self._lock:
            sender = self._in_flight.pop(request_id, None)
        if sender is not None:
            self._answers.put((sender, answer))

    def _fail_all(self, error: MultiloraError) -> None:
        for request_id in list(self._in_flight):
            self._settle(request_id, error)

    def _unavailable(self, why: str) -> MultiloraError:
        return MultiloraError(ErrorCode.UNAVAILABLE, f"{why}; please retry")

    def _answer(self) -> None:
        while (item := self._answers.get()) is not None:
            sender, answer = item
            try:
                if isinstance(answer, MultiloraError):
                    sender.fail(answer)
                else:
                    text = json.dumps(answer, ensure_ascii=False).encode()
                    sender.send({"result": np.array([text], dtype=np.object_)}, final=True)
            except Exception as error:  # the client may be gone; the next one is not
                log.warning("an answer could not be sent: %s", error)
