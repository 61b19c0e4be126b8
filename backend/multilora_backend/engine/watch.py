# SPDX-License-Identifier: Apache-2.0
"""The engine lives as long as one of its front ends: no orphan keeps a GPU.

Liveness is looked up in /proc and not left to heartbeats, so a front end that is busy is never taken for dead.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from multilora_backend.processes import Process

INTERVAL_S = 0.25
GRACE_S = 5.0
"""How long the main loop may take to leave before the process is ended under it."""


@dataclass(frozen=True)
class _Frontend:
    process: Process | None
    server: Process | None
    serves: bool

    @property
    def alive(self) -> bool:
        return all(p is None or p.alive for p in (self.process, self.server))


class FrontendWatch:
    """Knows the front ends by name and tells when one or the last one is gone."""

    def __init__(self, on_death: Callable[[str], None]) -> None:
        """`on_death(name)` is called from the watch's thread; `name` is empty when nobody is left."""
        self._on_death = on_death
        self._lock = threading.Lock()
        self._frontends: dict[str, _Frontend] = {}
        threading.Thread(target=self._run, name="frontend-watch", daemon=True).start()

    def add(self, name: str, pid: int, server_pid: int, serves: bool = True) -> None:
        """The front end lives while both processes do; a pid of 0 is not watched.

        One that does not serve does not count when it is asked whether anybody is left.
        """
        process, server = (Process.of(p) if p else None for p in (pid, server_pid))
        with self._lock:
            self._frontends[name] = _Frontend(process, server, serves)

    def remove(self, name: str) -> bool:
        """A front end said goodbye; returns whether others are left."""
        with self._lock:
            self._frontends.pop(name, None)
            return self._left()

    def _left(self) -> bool:
        return any(frontend.serves for frontend in self._frontends.values())

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            with self._lock:
                dead = {name: frontend for name, frontend in self._frontends.items() if not frontend.alive}
                for name, frontend in dead.items():
                    del self._frontends[name]
                    # A stub whose tritonserver was killed may hang for ever in a call to it, holding Python's lock,
                    # so it cannot end itself.
                    if frontend.process is not None:
                        frontend.process.kill()
                left = self._left()
            for name in dead:
                self._on_death(name)
            if not left:
                self._on_death("")
                time.sleep(GRACE_S)
                os._exit(3)
