# SPDX-License-Identifier: Apache-2.0
"""Worker threads that read adapters, so that the engine's thread never waits for a disk."""

from __future__ import annotations

import itertools
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Protocol

import torch

from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.composing import Compose, compose, run_composed
from multilora_backend.adapters.jobs import Job, Outcome, Purpose
from multilora_backend.adapters.layout import AdapterWeights
from multilora_backend.adapters.peft import AdapterPlan, check_adapter, fingerprint, read_adapter
from multilora_backend.adapters.sources import Source
from multilora_backend.core import LoraSite
from multilora_backend.errors import MultiloraError

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0

SWITCH_INTERVAL_S = 0.0005
"""How long the step loop waits for the interpreter while a loader thread runs Python; the default of 5 ms is too long.

Reading all the time in two threads, p99 between tokens rose by 52% with the default, by 26% with this, and by 32% with
0.05 ms and with 0.01 ms (one H200, 128 running, 8.2 ms a step).
"""

TORCH_THREADS = 4
"""Of torch in each loader thread, which would otherwise take all cores for itself.

Two threads read 9.1 adapters of 84 MB a second with this and 7.1 with 16 on 16 cores, and a read beside a loop that
launches kernels took 197 ms instead of 290 (the host of one H200).
"""


class Loader(Protocol):
    """What the manager needs; the tests have one without threads."""

    def submit(self, job: Job) -> None: ...

    def hurry(self, job: Job) -> None:
        """Somebody waits for the weights by now: if the job has not begun, it becomes as urgent as Purpose.DEVICE."""
        ...

    def finished(self) -> list[Outcome]:
        """What ended since the last call, without waiting."""
        ...

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until nothing is under way; False if that takes longer."""
        ...

    def close(self) -> None: ...


def _folder(source: Source) -> Path:
    return source.path


_Jobs = queue.PriorityQueue[tuple[int, int, Job | None]]


class ThreadLoader:
    """A few daemon threads over a priority queue, and as many over one for what may have to be downloaded first: a slow
    network keeps nobody waiting who needs none."""

    def __init__(
        self,
        read: Callable[[Path, Source], AdapterWeights],
        check: Callable[[Path, Source], AdapterPlan],
        threads: int,
        on_change: Callable[[], None],
        locate: Callable[[Source], Path] = _folder,
        compose: Compose | None = None,
    ) -> None:
        """`locate` gives the folder of a source and may download it; it raises as `read` and `check` do.

        `on_change` is called from a worker thread after each outcome.
        """
        self._locate = locate
        self._read = read
        self._check = check
        self._compose = compose
        self._on_change = on_change
        self._local: _Jobs = queue.PriorityQueue()
        self._remote: _Jobs = queue.PriorityQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._order = itertools.count()
        self._unfinished = 0
        self._queued: set[Job] = set()
        """What has not begun. A job that was hurried has two entries in its queue; the later one finds it gone."""
        self._idle = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, args=(jobs,), name=f"adapter-{name}-{i}", daemon=True)
            for jobs, name in ((self._local, "loader"), (self._remote, "download"))
            for i in range(threads)
        ]
        # Asked here, since the answer is fixed for a thread when it first asks, and set for all that ask later.
        self._torch_threads = min(TORCH_THREADS, torch.get_num_threads())
        if threads:
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        with self._idle:
            self._unfinished += 1
            self._queued.add(job)
        self._put(job, job.purpose)

    def hurry(self, job: Job) -> None:
        self._put(job, Purpose.DEVICE)

    def _put(self, job: Job, purpose: Purpose) -> None:
        jobs = self._local if job.is_local else self._remote
        jobs.put((purpose, next(self._order), job))

    def finished(self) -> list[Outcome]:
        return [self._outcomes.get_nowait() for _ in range(self._outcomes.qsize())]

    def wait_idle(self, timeout_s: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: not self._unfinished, timeout_s)

    def close(self) -> None:
        """Drops what has not begun and waits a little for what has."""
        for jobs in (self._local, self._remote):
            for _ in self._threads:
                jobs.put((Purpose.STOP, next(self._order), None))
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)

    def _work(self, jobs: _Jobs) -> None:
        torch.set_num_threads(self._torch_threads)
        while True:
            _, _, job = jobs.get()
            if job is None:
                return
            with self._idle:
                if job not in self._queued:
                    continue
                self._queued.remove(job)
            self._outcomes.put(self._run(job))
            with self._idle:
                self._unfinished -= 1
                self._idle.notify_all()
            self._on_change()

    def _run(self, job: Job) -> Outcome:
        if not job.parts and job.cached is not None and (job.frozen or not job.source.is_local):
            # Whether something else lies behind a URL is asked when it must be read again, not at every load.
            return Outcome(job, job.known, weights=job.cached)
        begin = time.monotonic()
        now = fingerprint(job.source.path) if job.source.is_local else None
        try:
            if job.parts and self._compose is not None:
                return run_composed(job, self._run, self._compose)
            folder = self._locate(job.source)
            if not job.source.is_local:
                now = fingerprint(folder)
            if job.purpose is Purpose.LOOK:
                return Outcome(job, now)
            if not job.weights:
                return Outcome(job, now, plan=self._check(folder, job.source))
            if job.cached is not None and now == job.known:
                return Outcome(job, now, weights=job.cached)
            weights = self._read(folder, job.source)
            return Outcome(job, now, weights=weights, seconds=time.monotonic() - begin)
        except MultiloraError as error:
            return Outcome(job, now, reason=error.message)
        except (OSError, MemoryError, RuntimeError) as error:  # torch raises RuntimeError when it gets no memory
            log.warning("adapter %s: %s", job.key, error)
            return Outcome(job, None, reason=f"cannot be read: {getattr(error, 'strerror', None) or error}")
        except Exception as error:  # whatever a file does to its parser, it ends this adapter and not the thread
            log.exception("adapter %s", job.key)
            return Outcome(job, None, reason=f"{type(error).__name__}: {error}")


def peft_loader(
    sites: Sequence[LoraSite],
    dtype: torch.dtype,
    pin: bool,
    threads: int,
    on_change: Callable[[], None],
    locate: Callable[[Source], Path] = _folder,
    base: BaseModel | None = None,
) -> ThreadLoader:
    """Threads that read PEFT's folders for a model's sites, in pinned memory if `pin`."""

    def read(folder: Path, source: Source) -> AdapterWeights:
        return read_adapter(folder, sites, dtype, pin, source.inside, source.sha256, base)

    def check(folder: Path, source: Source) -> AdapterPlan:
        return check_adapter(folder, sites, source.inside, base)

    def composed(parts: Sequence[tuple[AdapterWeights, Decimal]]) -> AdapterWeights:
        return compose(parts, sites, dtype, pin)

    return ThreadLoader(read, check, threads, on_change, locate, composed)
