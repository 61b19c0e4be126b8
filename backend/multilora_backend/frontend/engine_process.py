# SPDX-License-Identifier: Apache-2.0
"""The engine as a child process: who starts it, how its death is noticed, and what it said last."""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from multilora_backend.config import Config
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend import runtime
from multilora_backend.frontend.runtime import RuntimeFolder
from multilora_backend.processes import Process
from multilora_backend.tritonserver import SAVED_LIBRARY_PATH

log = logging.getLogger(__name__)

RECORD = "engine.json"
EXIT_CONFIGURATION = 2
"""The engine's exit status when starting it again would not help."""
PREFIX = "multilora engine: "
"""How it then begins the line that says why."""
_TAIL_LINES = 30
_OUTPUT_WAIT_S = 1.0
_EXIT_WAIT_S = 5.0
_TERM_WAIT_S = 1.0


class Child(threading.Thread):
    """A started engine; the thread copies its output to our stderr, which is in the server's log."""

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        super().__init__(name="engine-output", daemon=True)
        self.popen = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in the server's terminal is not for the engine: it leaves in order
        )
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self.start()

    def run(self) -> None:
        for line in self.popen.stdout or ():
            if line.strip():
                self._lines.append(line.rstrip())
            sys.stderr.write(line)
            sys.stderr.flush()

    def obituary(self) -> str:
        """Why it died. Waits for its end."""
        status = self.popen.wait()
        self.join(_OUTPUT_WAIT_S)  # not for ever: a grandchild may hold the pipe open
        lines = [line for line in self._lines if status != EXIT_CONFIGURATION or line.startswith(PREFIX)]
        words = lines[-1].removeprefix(PREFIX) if lines and status > 0 else ""
        if status == EXIT_CONFIGURATION:
            return f"the engine refuses its configuration: {words}"
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"the engine process ended {how}" + (f": {words}" if words else "")


@dataclass(frozen=True)
class EngineHandle:
    """A living engine, whoever started it."""

    process: Process
    child: Child | None = None
    """Set if this front end started it."""

    @property
    def alive(self) -> bool:
        return self.process.alive

    def obituary(self) -> str:
        """Why the engine died, in words, as far as this front end can know."""
        return "the engine process ended" if self.child is None else self.child.obituary()

    def open_pidfd(self) -> int | None:
        """A descriptor that polls readable once the engine is dead; None where the system has none: ask `alive`."""
        try:
            return os.pidfd_open(self.process.pid)
        except (AttributeError, OSError):
            return None


class Engines(Protocol):
    """Where a link gets its engine; used by the link's thread alone."""

    @property
    def address(self) -> str: ...

    @property
    def leads(self) -> bool: ...

    def try_lead(self) -> bool: ...

    def attach_or_start(self) -> EngineHandle | None:
        """None: there is none yet, ask again soon. Raises MultiloraError if it cannot be started."""

    def end(self, handle: EngineHandle | None, patient: bool) -> None:
        """The link leaves, after Bye was said."""


class EngineProcess:
    """Finds the engine that the front ends of a model share, or starts it."""

    def __init__(self, config: Config, folder: RuntimeFolder, server_pid: int, environ: Mapping[str, str]) -> None:
        self._config = config
        self._folder = folder
        self._server_pid = server_pid
        self._environ = dict(environ)
        self._record = folder.path / RECORD

    @property
    def address(self) -> str:
        return runtime.address(self._folder.path)

    @property
    def leads(self) -> bool:
        return self._folder.leads

    def try_lead(self) -> bool:
        return self._folder.try_lead()

    def attach_or_start(self) -> EngineHandle | None:
        """The living engine; a new one if there is none and this front end leads; else None: ask again soon.

        Raises MultiloraError(UNAVAILABLE) if the interpreter cannot be run.
        """
        leads = self._folder.try_lead()
        return recorded(self._folder.path) or (self._start() if leads else None)

    def end(self, handle: EngineHandle | None, patient: bool) -> None:
        """Leaves the engine, after Bye was said. The last front end sees to it that the engine is gone.

        `patient` lets it leave by itself first, which it does on the last Bye.
        """
        last = self._folder.last()
        if last and handle is not None and not (patient and _gone(handle, _EXIT_WAIT_S)):
            log.warning("the engine (pid %d) does not leave by itself: it is ended", handle.process.pid)
            for number, wait in ((signal.SIGTERM, _TERM_WAIT_S), (signal.SIGKILL, _EXIT_WAIT_S)):
                if handle.alive:
                    with suppress(ProcessLookupError):
                        os.kill(handle.process.pid, number)
                if _gone(handle, wait):
                    break
        self._folder.leave(remove=last)

    def _start(self) -> EngineHandle:
        python = self._config.engine_python or shutil.which("python3", path=self._environ.get("PATH", os.defpath))
        if python is None:
            raise MultiloraError(ErrorCode.UNAVAILABLE, "engine_python: is not set, and PATH has no python3")
        self._folder.socket.unlink(missing_ok=True)
        config = self._folder.path / "config.json"
        config.write_text(self._config.to_json())
        command = [python, "-m", "multilora_backend.engine", "--address", self.address, "--config", str(config)]
        command += ["--parent", str(os.getpid()), "--server", str(self._server_pid)]
        try:
            child = Child(command, self._environment())
        except OSError as error:
            raise MultiloraError(ErrorCode.UNAVAILABLE, f"engine_python: {python} cannot be run: {error}") from error
        handle = EngineHandle(Process.of(child.popen.pid), child)
        temporary = self._record.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(handle.process)))
        temporary.replace(self._record)  # in one step: the others read it at any time
        log.info("started the engine (pid %d)", handle.process.pid)
        return handle

    def _environment(self) -> dict[str, str]:
        environ = dict(self._environ)
        saved = environ.pop(SAVED_LIBRARY_PATH, None)
        if saved is not None:
            environ.pop("LD_LIBRARY_PATH", None)
            if saved:
                environ["LD_LIBRARY_PATH"] = saved
        return environ


def recorded(folder: Path) -> EngineHandle | None:
    """The living engine of a runtime folder, None if there is none."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    handle = EngineHandle(Process(record["pid"], record["started"]))
    return handle if handle.alive else None


def _gone(handle: EngineHandle, timeout: float) -> bool:
    """Waits for the engine's end, and reaps it if it is our child."""
    pidfd = handle.open_pidfd()
    if pidfd is not None and handle.alive:
        select.select([pidfd], [], [], timeout)
    elif pidfd is None:
        deadline = time.monotonic() + timeout
        while handle.alive and time.monotonic() < deadline:
            time.sleep(0.02)
    if pidfd is not None:
        os.close(pidfd)
    if handle.alive:
        return False
    if handle.child is not None:
        handle.child.popen.wait()
    return True
