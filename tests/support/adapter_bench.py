# SPDX-License-Identifier: Apache-2.0
"""An adapter manager whose loader has no threads and whose clock only tests move."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.composing import compose, run_composed
from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.jobs import Job, Outcome, Purpose
from multilora_backend.adapters.layout import AdapterWeights, allocate, numel
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.peft import AdapterPlan
from multilora_backend.adapters.pool import Transfer
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.sources import Source
from multilora_backend.adapters.state import AdapterState, Fingerprint
from multilora_backend.core import LoraSite
from multilora_backend.errors import invalid


def source_of(folder: str) -> Source:
    return Source.of_folder(Path("/nowhere") / folder)


def admit(text: str) -> Source:
    """Any folder but those that begin with "secret"."""
    if text.startswith("secret"):
        raise invalid("source", f"{text!r} is not below any of adapter_roots")
    return source_of(text)


SITE = LoraSite("linear", in_features=3, modules=("linear",), out_features=(2,))
BYTES_PER_RANK = 4 * (3 + 2)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


Content = int | str | OSError
"""A rank, or why an adapter is broken, or cannot be read."""


class MemoryLoader:
    """Folders are names here, and jobs end when a test says so."""

    def __init__(self, content: dict[str, Content], pin: bool = False) -> None:
        self.content = content
        self.pin = pin
        self.jobs: list[Job] = []
        self.outcomes: list[Outcome] = []
        self.read: list[str] = []
        self.hurried: list[str] = []
        self._stamps: Counter[str] = Counter()

    def change(self, folder: str, content: Content) -> None:
        """Rewrites a folder, perhaps to what it was."""
        self.content[folder] = content
        self._stamps[folder] += 1

    def fingerprint(self, folder: str) -> Fingerprint:
        return ((self._stamps[folder], 0, 0),) if folder in self.content else (None,)

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def hurry(self, job: Job) -> None:
        self.hurried.append(job.key)

    def run(self, count: int = 10**6) -> None:
        """The first jobs end."""
        jobs, self.jobs = self.jobs[:count], self.jobs[count:]
        self.outcomes += [self._run(job) for job in jobs]

    def _run(self, job: Job) -> Outcome:
        if job.parts:
            return run_composed(job, self._run, lambda parts: compose(parts, [SITE], torch.float32, self.pin))
        folder = job.source.path.name
        content, now = self.content.get(folder, "does not exist"), self.fingerprint(folder)
        if job.cached is not None and (job.frozen or job.known == now):
            return Outcome(job, job.known, weights=job.cached)
        if job.purpose is Purpose.LOOK:
            return Outcome(job, now)
        if isinstance(content, OSError):
            return Outcome(job, None, reason=str(content))
        if isinstance(content, str):
            return Outcome(job, now, reason=content)
        if not job.weights:
            return Outcome(job, now, plan=AdapterPlan((), content, numel(SITE, content)))
        self.read.append(folder)
        return Outcome(job, now, weights=weights_of(folder, content, self.pin), seconds=0.01)

    def finished(self) -> list[Outcome]:
        outcomes, self.outcomes = self.outcomes, []
        return outcomes

    def wait_idle(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass


def version_of(folder: str, rank: int) -> str:
    return hashlib.blake2b(f"{folder} {rank}".encode(), digest_size=16).hexdigest()


def weights_of(folder: str, rank: int, pin: bool = False) -> AdapterWeights:
    """What says whose it is: another value for every folder and rank."""
    buffers, (site,) = allocate([SITE], {0}, rank, torch.float32, pin)
    for tensor in (site.a, site.b):
        tensor.zero_()
        tensor[:rank] = float(sum(folder.encode()) * 64 + rank)
    return AdapterWeights(version_of(folder, rank), rank, (site,), buffers, no_effect=False)


class HeldEvent:
    """A CUDA event that a test lets happen, or fail: `now` does what the copies before it do."""

    def __init__(self, now: Callable[[], None]) -> None:
        self.now = now
        self.done = False
        self.error: RuntimeError | None = None

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.done

    def happen(self) -> None:
        self.now()
        self.done = True


class Bench:
    def __init__(
        self,
        content: dict[str, Content],
        ranks: int = 24,
        hold: bool = False,
        device: str = "cpu",
        more_folders: dict[str, Content] | None = None,
        **more,
    ) -> None:
        """`content`: by name, each in a folder of that name. `hold`: what is written to the pool is garbage until
        `arrive`. `more_folders`: that are not among the configured adapters."""
        self.clock = Clock()
        self.loader = MemoryLoader({**content, **(more_folders or {})}, pin=device == "cuda")
        self.names = list(content)
        settings = {"host_bytes": 10**6, "load_threads": 8, **more}
        self.manager = AdapterManager(
            Catalogue(self.entry(name) for name in content),
            [SITE],
            device_bytes=ranks * BYTES_PER_RANK,
            dtype=torch.float32,
            device=device,
            clock=self.clock,
            loader=self.loader,
            admit=admit,
            **settings,
        )
        self.held: list[HeldEvent] = []
        if hold:
            self.pool_write = self.manager.pool.write
            self.manager.pool.write = self.write_later

    def entry(self, name: str, folder: str = "", **fields) -> AdapterEntry:
        """As the watcher would see it now."""
        folder = folder or name
        return AdapterEntry(name, source_of(folder), fingerprint=self.loader.fingerprint(folder), **fields)

    def reconcile(self, **entries: AdapterEntry | None) -> dict[str, str]:
        """The configured adapters as they are now, with these instead; None for one that has gone."""
        wanted = {name: self.entry(name) for name in self.names} | entries
        self.names = [name for name, entry in wanted.items() if entry is not None]
        return self.manager.reconcile(entry for entry in wanted.values() if entry is not None)

    def write_later(self, weights: AdapterWeights, slot: int, rank_start: int, extras_start: int = 0) -> Transfer:
        self.pool_write(weights, slot, rank_start, extras_start)
        ranks = slice(rank_start, rank_start + padded(weights.rank))
        self.manager.pool.b[0][ranks] = torch.nan
        self.held.append(HeldEvent(lambda: self.manager.pool._copy(weights, rank_start)))
        return Transfer(weights, self.held[-1])

    def arrive(self, count: int = 10**6) -> None:
        for event in self.held[:count]:
            event.happen()
        del self.held[:count]

    def land(self) -> list[str]:
        """All reads end; returns what failed."""
        self.loader.run()
        return self.manager.poll().failed

    def activate(self, *names: str) -> None:
        for name in names:
            self.clock.now += 1
            self.manager.request(name)
            self.land()
            self.manager.poll()  # what was copied at once arrives now
            if self.manager.transferring and not self.held:  # on a real device
                torch.cuda.synchronize()
                self.manager.poll()
            assert self.state(name) is AdapterState.ACTIVE

    def settle(self, turns: int = 4) -> None:
        """Until nothing is under way."""
        for _ in range(turns):
            self.loader.run()
            self.arrive()
            self.manager.poll()

    def state(self, name: str) -> AdapterState:
        return self.manager.records[name].state
