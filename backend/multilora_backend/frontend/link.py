# SPDX-License-Identifier: Apache-2.0
"""A front end's way to the engine: one thread that owns the connection and lives through the engine's deaths."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from enum import Enum

import zmq

from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.connection import Connection
from multilora_backend.frontend.engine_process import Engines
from multilora_backend.frontend.listener import Listener
from multilora_backend.protocol import (
    Abort,
    AdapterCommand,
    AdapterReply,
    Failed,
    Hello,
    Outputs,
    Ready,
    Retokenise,
    Stats,
    Submit,
)

log = logging.getLogger(__name__)

TICK_S = 0.1
"""How often a front end without an engine looks for one."""
MAX_MESSAGES = 64
"""Taken in at once; then submissions and aborts have their turn."""
LEAD_INTERVAL_S = 1.0
"""How often one that follows looks whether its leader is gone."""
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
STABLE_S = 10.0
"""An engine that has served this long is started again at once when it dies."""


class State(Enum):
    STARTING = "is starting"
    READY = "is ready"
    RESTARTING = "is being started again"
    CLOSED = "has been shut down"


class Link:
    """`submit` and `abort` may be called by any thread."""

    def __init__(self, engine: Engines, hello: Hello, listener: Listener) -> None:
        self._engine = engine
        self._hello = hello
        self._listener = listener
        self._lock = threading.Lock()
        self._state = State.STARTING
        self._outgoing: deque[Submit | Abort | AdapterCommand] = deque()
        self._last_reason = ""
        self._settled = threading.Event()
        """The first start has ended: well, or with `_failure`."""
        self._failure: MultiloraError | None = None
        self._closing = False
        self._connection: Connection | None = None
        self._ready_at = 0.0
        self._restarts = 0
        self._next_try = 0.0
        self._next_lead = 0.0
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    @property
    def ready(self) -> bool:
        return self._state is State.READY

    def begin(self) -> None:
        """Looks for the engine from now on, and returns at once."""
        self._thread.start()

    def start(self, timeout_s: float) -> None:
        """Returns when the engine serves. Raises MultiloraError with the reason if it does not; then call `close`."""
        self.begin()
        if not self._settled.wait(timeout_s):
            raise MultiloraError(
                ErrorCode.UNAVAILABLE, f"the engine was not ready after engine_start_timeout_s ({timeout_s:g} s)"
            )
        if self._failure is not None:
            raise self._failure

    def submit(self, message: Submit | AdapterCommand) -> None:
        """Raises MultiloraError(UNAVAILABLE) at once if there is no engine to take it."""
        # Under the lock, so that a request is either refused here or known to be lost when on_lost is called.
        with self._lock:
            if self._state is not State.READY:
                why = f" ({self._last_reason})" if self._last_reason else ""
                raise MultiloraError(ErrorCode.UNAVAILABLE, f"the engine {self._state.value}{why}; please retry")
            self._outgoing.append(message)
        self._wake()

    def abort(self, request_id: int, index: int = -1) -> None:
        with self._lock:
            if self._state is not State.READY:
                return
            self._outgoing.append(Abort(request_id, index))
        self._wake()

    def close(self) -> None:
        """Says goodbye; the last front end to do so waits for the engine's end."""
        self._closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._tick()
                self._poll()
        except Exception as error:  # nothing else tells the clients that nothing will come any more
            log.exception("the link to the engine failed")
            self._last_reason = str(error)
            if not self._settled.is_set():
                self._failure = MultiloraError(ErrorCode.UNAVAILABLE, self._last_reason)
            self._listener.on_lost(self._last_reason)
        finally:
            self._leave()

    def _tick(self) -> None:
        now = time.monotonic()
        if self._connection is None and now >= self._next_try:
            self._next_try = now + TICK_S
            try:
                engine = self._engine.attach_or_start()
            except MultiloraError as error:
                self._failed_start(error.message)
                return
            if engine is not None:
                self._connection = Connection(self._context, self._poller, self._engine.address, engine, self._hello)
        elif self._connection is not None and now >= self._next_lead:
            self._next_lead = now + LEAD_INTERVAL_S
            self._engine.try_lead()

    def _poll(self) -> None:
        events = dict(self._poller.poll(int(TICK_S * 1000)))
        if self._wake_fd in events:
            os.eventfd_read(self._wake_fd)
        connection = self._connection
        if connection is None:
            return
        # Asked before the socket is read, so that the last words of a dead engine still count.
        dead = connection.dead(events)
        self._receive(connection, None if dead else MAX_MESSAGES)
        if dead:
            self._lost(connection)
        else:
            self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        while self._outgoing:
            connection.send(self._outgoing.popleft())

    def _receive(self, connection: Connection, limit: int | None) -> None:
        for message in connection.receive(limit):
            if isinstance(message, Outputs):
                self._listener.on_outputs(message.items)
            elif isinstance(message, Failed):
                self._listener.on_failed(message)
            elif isinstance(message, Retokenise):
                self._listener.on_retokenise(message)
            elif isinstance(message, AdapterReply):
                self._listener.on_reply(message)
            elif isinstance(message, Stats):
                self._listener.on_stats(message, self._engine.leads)
            else:
                self._become_ready(message)

    def _become_ready(self, ready: Ready) -> None:
        self._listener.on_ready(ready)
        self._ready_at = time.monotonic()
        with self._lock:
            self._state = State.READY
        log.info("attached to the engine (pid %d)%s", ready.pid, " as its leader" if self._engine.leads else "")
        self._settled.set()

    def _lost(self, connection: Connection) -> None:
        was_ready = self.ready
        with self._lock:
            self._state = State.RESTARTING if self._settled.is_set() else State.STARTING
            self._outgoing.clear()
        connection.close()
        self._connection = None
        reason = self._last_reason = connection.engine.obituary()
        if was_ready:
            log.error("%s; it is started again", reason)
            if time.monotonic() - self._ready_at > STABLE_S:
                self._restarts = 0
            self._listener.on_lost(reason)
            self._back_off()
        elif connection.engine.child is not None:
            self._failed_start(reason)

    def _failed_start(self, reason: str) -> None:
        """The first time, the model's load fails with the reason; later the start is tried again for ever."""
        log.error("%s", reason)
        self._last_reason = reason
        if not self._settled.is_set():
            self._failure = MultiloraError(ErrorCode.UNAVAILABLE, reason)
            self._closing = True
            self._settled.set()
        self._back_off()

    def _back_off(self) -> None:
        """The first restart is immediate; the following ones wait longer and longer."""
        delay = FIRST_BACKOFF_S * 2 ** min(self._restarts - 1, 10) if self._restarts else 0.0
        self._next_try = time.monotonic() + min(delay, MAX_BACKOFF_S)
        self._restarts += 1

    def _leave(self) -> None:
        connection, was_ready = self._connection, self.ready
        with self._lock:
            self._state = State.CLOSED
        if connection is not None:
            if was_ready:
                self._flush(connection)
            connection.close(goodbye=was_ready)
        self._context.term()
        self._engine.end(connection.engine if connection else None, patient=was_ready)
        self._settled.set()
