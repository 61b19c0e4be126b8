# SPDX-License-Identifier: Apache-2.0
"""Worker threads that read adapters, so that the engine's thread never waits for a disk."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from multilora_backend.adapters.layout import AdapterWeights
from multilora_backend.adapters.peft import AdapterPlan, fingerprint
from multilora_backend.adapters.state import Fingerprint
from multilora_backend.errors import MultiloraError

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
_STOP, _LOAD, _CHECK = range(3)
"""Priorities: loads that somebody waits for overtake the checks of server start."""


@dataclass(frozen=True)
class Job:
    name: str
    folder: Path
    weights: bool
    """Read the weights; otherwise only check what can be checked without."""
    known: Fingerprint | None = None
    cached: AdapterWeights | None = None
    """What the folder held when its fingerprint was `known`."""


@dataclass(frozen=True)
class Outcome:
    """Exactly one of `weights`, `plan` and `reason` is set: loaded, checked, or failed."""

    job: Job
    fingerprint: Fingerprint | None
    """Taken before reading; None if reading failed for a cause outside of the folder's content."""
    weights: AdapterWeights | None = None
    plan: AdapterPlan | None = None
    reason: str = ""


class Loader(Protocol):
    """What the manager needs; the tests have one without threads."""

    def submit(self, job: Job) -> None: ...

    def finished(self) -> list[Outcome]:
        """What ended since the last call, without waiting."""
        ...

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until nothing is under way; False if that takes longer."""
        ...

    def close(self) -> None: ...


class ThreadLoader:
    """A few daemon threads over one priority queue."""

    def __init__(
        self,
        read: Callable[[Path], AdapterWeights],
        check: Callable[[Path], AdapterPlan],
        threads: int,
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is called from a worker thread after each outcome."""
        self._read = read
        self._check = check
        self._on_change = on_change
        self._jobs: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._order = itertools.count()
        self._unfinished = 0
        self._idle = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"adapter-loader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        with self._idle:
            self._unfinished += 1
        self._jobs.put((_LOAD if job.weights else _CHECK, next(self._order), job))

    def finished(self) -> list[Outcome]:
        return [self._outcomes.get_nowait() for _ in range(self._outcomes.qsize())]

    def wait_idle(self, timeout_s: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: not self._unfinished, timeout_s)

    def close(self) -> None:
        """Drops what has not begun and waits a little for what has."""
        for _ in self._threads:
            self._jobs.put((_STOP, next(self._order), None))
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        while True:
            _, _, job = self._jobs.get()
            if job is None:
                return
            self._outcomes.put(self._run(job))
            with self._idle:
                self._unfinished -= 1
                self._idle.notify_all()
            self._on_change()

    def _run(self, job: Job) -> Outcome:
        now = fingerprint(job.folder)
        try:
            if not job.weights:
                return Outcome(job, now, plan=self._check(job.folder))
            cached = job.cached if now == job.known else None
            return Outcome(job, now, weights=cached or self._read(job.folder))
        except MultiloraError as error:
            return Outcome(job, now, reason=error.message)
        except (OSError, MemoryError, RuntimeError) as error:  # torch raises RuntimeError when it gets no memory
            log.warning("adapter %s: %s", job.name, error)
            return Outcome(job, None, reason=f"cannot be read: {getattr(error, 'strerror', None) or error}")
        except Exception as error:  # whatever a file does to its parser, it ends this adapter and not the thread
            log.exception("adapter %s", job.name)
            return Outcome(job, None, reason=f"{type(error).__name__}: {error}")
