# SPDX-License-Identifier: Apache-2.0
"""Carries out the commands of operators between two steps, and answers those that wait when they are done.

Every command is idempotent: what is there already is not an error. Nothing here blocks: a command that takes time is
begun, and `poll` looks whether it is done.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.protocol import (
    AdapterArguments,
    AdapterCommand,
    AdapterInfo,
    AdapterReply,
    EngineMessage,
    Failed,
)

log = logging.getLogger(__name__)

POLL_S = 0.01
"""How often waiting commands are looked at: that is work on the step loop."""
MAX_WAITING = 256
_TAKE_TIME = frozenset({"load", "unload", "pin", "unpin", "alias", "unalias", "preload"})
"""If only the few milliseconds until a restart would know of it."""


class Adapters(Protocol):
    """What is used of `AdapterManager`."""

    def load(
        self, name: str, source: str = "", *, version: str = "", pinned: bool = False, tenants: Iterable[str] = ()
    ) -> None: ...

    def unload(self, name: str) -> None: ...

    def pin(self, name: str) -> None: ...

    def unpin(self, name: str) -> None: ...

    def alias(self, alias: str, target: str) -> None: ...

    def unalias(self, alias: str) -> None: ...

    def preload(self, name: str) -> None: ...

    def show(self, name: str) -> AdapterInfo: ...

    def names(self, prefix: str = "", state: str = "") -> list[str]: ...

    def draining(self, name: str) -> bool: ...

    @property
    def written(self) -> bool: ...


@dataclass(frozen=True)
class _Waiting:
    frontend: str
    command: AdapterCommand
    deadline: float


class Administration:
    """Engine thread only. `reply(frontend, message)` queues what is to be sent."""

    def __init__(
        self,
        adapters: Adapters,
        token: str,
        reply: Callable[[str, EngineMessage], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._adapters = adapters
        self._token = token.encode()
        self._reply = reply
        self._clock = clock
        self._waiting: list[_Waiting] = []
        self._next_poll = 0.0

    @property
    def waits(self) -> bool:
        """Some command is not done; call `poll` every `POLL_S` or so."""
        return bool(self._waiting)

    def handle(self, frontend: str, command: AdapterCommand) -> None:
        """Answers a command at once, or begins it and lets `poll` answer."""
        try:
            self._admit(command)
            result = self._carry_out(command)
            if result is None and not command.arguments.wait:
                result = self._so_far(command)
        except Exception as error:  # a command must never end the loop that serves everybody
            self._fail(frontend, command, error)
            return
        if result is None:
            # Not looked at before the manager has: what is on the host goes on to the device if that has room.
            self._waiting.append(_Waiting(frontend, command, self._clock() + command.arguments.timeout_s))
            self._next_poll = 0.0
        else:
            self._reply(frontend, AdapterReply(command.request_id, result))

    def poll(self) -> None:
        """Answers the commands that are done, have failed, or have waited long enough."""
        now = self._clock()
        if not self._waiting or now < self._next_poll:
            return
        self._next_poll = now + POLL_S
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            try:
                result = self._so_far(each.command)
            except Exception as error:  # as above
                self._fail(each.frontend, each.command, error)
                continue
            if result["done"] or now >= each.deadline:
                self._reply(each.frontend, AdapterReply(each.command.request_id, result))
            else:
                self._waiting.append(each)

    def drop_frontend(self, frontend: str) -> None:
        """Nobody is left to be answered; what was begun goes on."""
        self._waiting = [each for each in self._waiting if each.frontend != frontend]

    def _admit(self, command: AdapterCommand) -> None:
        if self._token and not hmac.compare_digest(command.token.encode(), self._token):
            raise invalid("token", "is missing or is not this server's admin_token")
        waits = command.action in _TAKE_TIME and command.arguments.wait
        if waits and len(self._waiting) >= MAX_WAITING:
            raise MultiloraError(ErrorCode.UNAVAILABLE, f"{MAX_WAITING} commands wait already; send wait: false")

    def _carry_out(self, command: AdapterCommand) -> dict[str, Any] | None:
        """Does what is asked for; the answer, or None if that takes time: `_so_far` tells."""
        adapters, arguments, name = self._adapters, command.arguments, command.arguments.name
        match command.action:
            case "list":
                return self._list(arguments)
            case "show":
                return self._told(name)
            case "alias":
                adapters.alias(arguments.alias, arguments.target)
            case "unalias":
                adapters.unalias(arguments.alias)
            case "load":
                adapters.load(
                    name,
                    arguments.source,
                    version=arguments.version,
                    pinned=arguments.pinned,
                    tenants=arguments.tenants,
                )
                adapters.preload(name)
            case "pin":
                adapters.pin(name)
            case "unpin":
                adapters.unpin(name)
            case "preload":
                adapters.preload(name)
            case "unload":
                adapters.unload(name)
            case _:
                raise invalid("action", f"is not known: {command.action!r}")
        return None

    def _so_far(self, command: AdapterCommand) -> dict[str, Any]:
        """How far a command has come that takes time; "done" says whether to the end. Raises if that cannot come."""
        name, written = command.arguments.name, self._adapters.written
        if command.action in ("alias", "unalias"):
            target = command.arguments.target or None
            return {"alias": command.arguments.alias, "target": target, "done": written}
        if command.action == "unload":
            return {"name": name, "done": written and not self._adapters.draining(name)}
        if command.action == "unpin":
            return {**self._told(name), "done": written}
        info = self._adapters.show(name)
        if info.state == AdapterState.FAILED.value:
            raise MultiloraError(ErrorCode.INTERNAL, f"LoRA {name} could not be loaded: {info.reason}")
        if info.reason and not info.pending:
            # What serves goes on, and is not what was asked for.
            raise MultiloraError(ErrorCode.INTERNAL, f"LoRA {name}: {info.reason}")
        # What the device has no room for is ready when it is on the host, unless it has to stay on the device.
        ready = info.level == "host" and not info.pinned and info.state == AdapterState.COLD.value
        return {
            "adapter": msgspec.to_builtins(info),
            "done": written and not info.pending and (info.level == "device" or ready),
        }

    def _told(self, name: str) -> dict[str, Any]:
        return {"adapter": msgspec.to_builtins(self._adapters.show(name))}

    def _list(self, asked: AdapterArguments) -> dict[str, Any]:
        names = self._adapters.names(asked.prefix, asked.state)
        page = names[asked.offset : asked.offset + asked.limit]
        return {
            "adapters": [msgspec.to_builtins(self._adapters.show(name)) for name in page],
            "total": len(names),
            "offset": asked.offset,
        }

    def _fail(self, frontend: str, command: AdapterCommand, error: Exception) -> None:
        if not isinstance(error, MultiloraError):
            log.error("%s failed", command.action, exc_info=error)
            error = MultiloraError(ErrorCode.INTERNAL, f"{command.action} failed: {type(error).__name__}: {error}")
        self._reply(frontend, Failed(command.request_id, error.code, error.message))
