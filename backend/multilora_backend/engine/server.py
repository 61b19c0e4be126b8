# SPDX-License-Identifier: Apache-2.0
"""The engine's sockets and main loop: messages, a step, replies, until the last front end is gone."""

from __future__ import annotations

import logging
import os
import queue
import time

import msgspec
import zmq

from multilora_backend.config import Config
from multilora_backend.engine import memory
from multilora_backend.engine.engine import Engine
from multilora_backend.engine.watch import FrontendWatch
from multilora_backend.protocol import (
    Abort,
    AdapterCommand,
    Bye,
    EngineMessage,
    Hello,
    Ready,
    Submit,
    encoder,
    frontend_decoder,
)

log = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.2
IDLE_POLL_MS = 100
WAITING_POLL_MS = 10
"""While a command waits until it is done."""
RECEIVE_S = 0.005
"""Messages are taken in for so long between two steps: 10,000 submissions at once take 0.7 s, and others have tokens to
come meanwhile."""
TRANSFER_POLL_MS = 1
"""While nothing runs but an adapter is on its way to the device: nobody wakes the loop when it is there."""


class EngineServer:
    """One ROUTER socket; a front end is known by its socket identity once it has said Hello."""

    def __init__(self, config: Config, address: str, parent: int, server: int) -> None:
        self._dead: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        # Watched from before the model is loaded: the launcher may die while it waits for us.
        self._watch = FrontendWatch(self._on_death)
        self._watch.add("launcher", parent, server)
        self._identities: dict[str, bytes] = {}
        self._names: dict[bytes, str] = {}
        self._serving: set[str] = set()
        """Those of them that serve requests."""
        self._stats_due = 0.0
        self._running = True
        self._idle = False
        self._engine = Engine(config, wake=self._wake)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._event, zmq.POLLIN)

    def run(self) -> None:
        """Returns when no front end is left."""
        memory.freeze_heap()
        busy = False
        while self._running:
            self._receive(timeout_ms=0 if busy else self._patience_ms())
            busy = self._engine.step()
            for name, messages in self._engine.take_replies().items():
                for message in messages:
                    self._send(name, message)
            self._report()
        self._engine.close()
        self._socket.close()

    def _patience_ms(self) -> int:
        if self._engine.adapters.transferring:
            return TRANSFER_POLL_MS
        if self._engine.administration.waits:
            return WAITING_POLL_MS
        # A tenant whose tokens are used up may go on then.
        rest_ms = (self._engine.scheduler.next_event() - time.monotonic()) * 1e3
        return int(max(1.0, min(IDLE_POLL_MS, rest_ms + 1.0)))

    def _receive(self, timeout_ms: int) -> None:
        ready = dict(self._poller.poll(timeout_ms))
        if self._event in ready:
            os.eventfd_read(self._event)
        while not self._dead.empty():
            self._leave(self._dead.get())
        until = time.monotonic() + RECEIVE_S
        while self._socket.poll(0) and time.monotonic() < until:
            identity, frame = self._socket.recv_multipart()
            try:
                message = frontend_decoder.decode(frame)
            except msgspec.DecodeError as error:
                log.error("a front end sent what is no message: %s", error)
                continue
            if isinstance(message, Hello):
                self._join(identity, message)
            elif identity not in self._names:
                log.error("%s from a front end that has not said Hello", type(message).__name__)
            elif isinstance(message, Submit):
                self._engine.submit(self._names[identity], message)
            elif isinstance(message, Abort):
                self._engine.abort(self._names[identity], message)
            elif isinstance(message, AdapterCommand):
                self._engine.command(self._names[identity], message)
            elif isinstance(message, Bye):
                self._leave(self._names[identity])

    def _join(self, identity: bytes, hello: Hello) -> None:
        self._watch.add(hello.name, hello.pid, hello.server_pid, hello.serves)
        if hello.serves:
            self._watch.remove("launcher")
            self._serving.add(hello.name)
            self._engine.statistics.start_over()
        self._identities[hello.name] = identity
        self._names[identity] = hello.name
        log.info("front end %s (pid %d) attached", hello.name, hello.pid)
        self._send(hello.name, Ready(os.getpid(), self._engine.card))

    def _leave(self, name: str) -> None:
        """A front end is gone; the empty name says that nobody is left."""
        others = self._watch.remove(name)
        identity = self._identities.pop(name, None)
        if identity is not None:
            del self._names[identity]
            self._serving.discard(name)
            self._engine.drop_frontend(name)
            log.info("front end %s left", name)
        self._running &= others and bool(name)

    def _send(self, name: str, message: EngineMessage) -> None:
        identity = self._identities.get(name)
        if identity is not None:
            self._socket.send_multipart([identity, encoder.encode(message)])

    def _report(self) -> None:
        now = time.monotonic()
        if now < self._stats_due:
            return
        self._stats_due = now + STATS_INTERVAL_S
        stats = self._engine.stats()
        for name in self._serving:
            self._send(name, stats)
        self._check_when_idle()

    def _check_when_idle(self) -> None:
        """Once each time the engine runs dry. A leak is a bug, but not a reason to fail requests."""
        idle, self._idle = self._idle, self._engine.idle
        if self._idle and not idle:
            try:
                self._engine.check_idle()
            except RuntimeError as error:
                log.error("integrity check: %s", error)

    def _on_death(self, name: str) -> None:
        self._dead.put(name)
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._event, 1)
