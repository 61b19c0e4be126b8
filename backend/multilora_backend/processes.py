# SPDX-License-Identifier: Apache-2.0
"""Who is alive, as /proc has it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks after boot; None if it is gone or a zombie."""
    try:
        # The command's name is in parentheses and may contain anything: count fields from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Process:
    """A pid with its start time: pids are reused, the pair is not."""

    pid: int
    started: str | None

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, start_time(pid))

    @property
    def alive(self) -> bool:
        return self.started is not None and start_time(self.pid) == self.started

    def kill(self) -> None:
        """SIGKILL, unless it is gone."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
