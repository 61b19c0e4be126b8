# SPDX-License-Identifier: Apache-2.0
"""The engine lives as long as one of its front ends: no orphan keeps a GPU.

Liveness is looked up in /proc and not left to heartbeats, so a front end that is busy is never taken for dead.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

INTERVAL_S = 0.25
GRACE_S = 5.0
"""How long the main loop may take to leave before the process is ended under it."""


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks after boot; None if it is gone or a zombie.

    Pids are reused, pairs of pid and start time are not.
    """
    try:
        # The command's name is in parentheses and may contain anything: count fields from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class FrontendWatch:
    """Knows the front ends by name and tells when one or the last one is gone."""

    def __init__(self, on_death: Callable[[str], None]) -> None:
        """`on_death(name)` is called from the watch's thread; `name` is empty when nobody is left."""
        self._on_death = on_death
        self._lock = threading.Lock()
        self._alive: dict[str, list[tuple[int, str | None]]] = {}
        threading.Thread(target=self._run, name="frontend-watch", daemon=True).start()

    def add(self, name: str, *pids: int) -> None:
        """The front end lives while all of `pids` do."""
        with self._lock:
            self._alive[name] = [(pid, start_time(pid)) for pid in pids if pid]

    def remove(self, name: str) -> bool:
        """A front end said goodbye; returns whether others are left."""
        with self._lock:
            self._alive.pop(name, None)
            return bool(self._alive)

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            with self._lock:
                dead = [
                    name
                    for name, processes in self._alive.items()
                    if any(started is None or start_time(pid) != started for pid, started in processes)
                ]
                for name in dead:
                    del self._alive[name]
                left = bool(self._alive)
            for name in dead:
                self._on_death(name)
            if not left:
                self._on_death("")
                time.sleep(GRACE_S)
                os._exit(3)
