# SPDX-License-Identifier: Apache-2.0
"""One front end's socket to one generation of the engine, and the watch over that engine's life."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping

import msgspec
import zmq

from multilora_backend.frontend.engine_process import EngineHandle
from multilora_backend.protocol import Bye, EngineMessage, FrontendMessage, Hello, encoder, engine_decoder

log = logging.getLogger(__name__)

_GOODBYE_MS = 500


class Connection:
    """Every generation gets a socket of its own, so nothing of a dead engine can reach its successor."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        address: str,
        engine: EngineHandle,
        hello: Hello,
    ) -> None:
        """Says Hello; the poller tells from now on of messages and of the engine's death."""
        self.engine = engine
        self._poller = poller
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # The engine binds when its model is loaded; until then libzmq tries again and again.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(address)
        self._pidfd = engine.open_pidfd()
        poller.register(self._socket, zmq.POLLIN)
        if self._pidfd is not None:
            poller.register(self._pidfd, zmq.POLLIN)
        self.send(hello)

    def send(self, message: FrontendMessage) -> None:
        self._socket.send(encoder.encode(message))

    def receive(self, limit: int | None = None) -> Iterator[EngineMessage]:
        """What has arrived, without waiting; at most `limit` messages."""
        while limit != 0 and self._socket.poll(0):
            limit = None if limit is None else limit - 1
            try:
                yield engine_decoder.decode(self._socket.recv())
            except msgspec.DecodeError as error:
                log.error("the engine sent what is no message: %s", error)

    def dead(self, events: Mapping[object, int]) -> bool:
        """Whether the engine is, by the events of a poll."""
        return not self.engine.alive if self._pidfd is None else self._pidfd in events

    def close(self, goodbye: bool = False) -> None:
        if goodbye:
            self.send(Bye())
            self._socket.setsockopt(zmq.LINGER, _GOODBYE_MS)
        self._poller.unregister(self._socket)
        self._socket.close()
        if self._pidfd is not None:
            self._poller.unregister(self._pidfd)
            os.close(self._pidfd)
