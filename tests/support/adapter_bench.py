# SPDX-License-Identifier: Apache-2.0
"""An adapter manager whose loader has no threads and whose clock only tests move."""

from __future__ import annotations

from pathlib import Path

import torch

from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.loader import Job, Outcome
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.peft import AdapterPlan, AdapterWeights, SiteWeights, fingerprint
from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import LoraSite

SITE = LoraSite("linear", in_features=3, modules=("linear",), out_features=(2,))
BYTES_PER_RANK = 4 * (3 + 2)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class MemoryLoader:
    """Jobs end when a test says so. An adapter's content is its rank, or why it is broken or cannot be read."""

    def __init__(self, content: dict[str, int | str | OSError]) -> None:
        self.content = content
        self.jobs: list[Job] = []
        self.outcomes: list[Outcome] = []
        self.read: list[str] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def run(self, count: int = 10**6) -> None:
        for job in self.jobs[:count]:
            content, now = self.content[job.name], fingerprint(job.folder)
            if isinstance(content, OSError):
                self.outcomes.append(Outcome(job, None, reason=str(content)))
            elif isinstance(content, str):
                self.outcomes.append(Outcome(job, now, reason=content))
            elif not job.weights:
                self.outcomes.append(Outcome(job, now, plan=AdapterPlan((), content, 5 * content)))
            elif job.cached is not None and job.known == now:
                self.outcomes.append(Outcome(job, now, weights=job.cached))
            else:
                self.read.append(job.name)
                self.outcomes.append(Outcome(job, now, weights=weights_of(job.name, content)))
        del self.jobs[:count]

    def finished(self) -> list[Outcome]:
        outcomes, self.outcomes = self.outcomes, []
        return outcomes

    def wait_idle(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass


def weights_of(name: str, rank: int) -> AdapterWeights:
    value = float(sum(name.encode()))
    site = SiteWeights(torch.full((1, rank, 3), value), torch.full((rank, 2), value))
    return AdapterWeights(f"{name}-r{rank}", rank, (site,), rank * BYTES_PER_RANK, (), no_effect=False)


class Bench:
    def __init__(
        self, content: dict[str, int | str | OSError], ranks: int = 24, root: Path = Path("/nowhere"), **more
    ) -> None:
        self.clock = Clock()
        self.loader = MemoryLoader(content)
        settings = {"host_bytes": 10**6, "load_threads": 8, **more}
        self.manager = AdapterManager(
            Catalogue((name, root / name) for name in content),
            [SITE],
            device_bytes=ranks * BYTES_PER_RANK,
            dtype=torch.float32,
            device="cpu",
            clock=self.clock,
            loader=self.loader,
            **settings,
        )

    def land(self) -> list[str]:
        self.loader.run()
        return self.manager.poll()

    def activate(self, *names: str) -> None:
        for name in names:
            self.clock.now += 1
            self.manager.request(name)
            self.land()
            assert self.state(name) is AdapterState.ACTIVE

    def state(self, name: str) -> AdapterState:
        return self.manager.records[name].state
