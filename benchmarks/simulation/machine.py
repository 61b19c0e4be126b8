# SPDX-License-Identifier: Apache-2.0
"""What stands in for the machine: a clock that is set, readers and a copy engine that only take time, no memory.

The manager, its host cache and its books of the device pool are the real ones. `blocking` machines let the clock run
while they load, as a server does that loads in its step loop.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from shapes import SHAPES, Shape

from multilora_backend.adapters.jobs import Job, Outcome, Purpose
from multilora_backend.adapters.layout import AdapterWeights, Buffer
from multilora_backend.adapters.peft import AdapterPlan
from multilora_backend.adapters.pool import DevicePool, Transfer
from multilora_backend.adapters.ranks import padded
from multilora_backend.core import LoraSite
from simulation.model import TimeModel


class Clock:
    """Seconds of virtual time. Calling it tells them, so it goes where a clock is asked for."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, to: float) -> None:
        self.now = max(self.now, to)


class VirtualLoader:
    """A few threads that read, the most urgent job first; what is in the host cache is there at once.

    What they read never changes, so that a fingerprint says nothing: it is empty.
    """

    def __init__(
        self,
        clock: Clock,
        model: TimeModel,
        rank_of: Callable[[str], int],
        bytes_per_rank: int,
        threads: int,
        blocking: bool,
    ) -> None:
        self._clock = clock
        self._model = model
        self._rank_of = rank_of
        self._bytes_per_rank = bytes_per_rank
        self._blocking = blocking
        self._queue: list[tuple[int, int, float, Job]] = []
        """Heap: purpose, order, when it was submitted, job."""
        self._order = itertools.count()
        self._reading: list[tuple[float, int, Outcome]] = []
        """Heap of the jobs that are under way: when each ends, order, and what comes of it."""
        self._free = [0.0] * threads
        """Heap of the idle threads, by the end of their last jobs."""
        self._ready: list[Outcome] = []
        self.reads = 0

    def submit(self, job: Job) -> None:
        if not job.weights:
            self._ready.append(Outcome(job, (), plan=AdapterPlan((), self._rank_of(job.key), 0)))
        elif job.cached is not None:
            self._ready.append(Outcome(job, (), weights=job.cached))
        else:
            self._work()  # what was there before is begun before, however urgent this one is
            heapq.heappush(self._queue, (job.purpose, next(self._order), self._clock(), job))
            self._work()
            while self._blocking and self._reading:
                self._clock.advance(self._reading[0][0])
                self._work()

    def hurry(self, job: Job) -> None:
        self._work()
        for index, (_, order, submitted, queued) in enumerate(self._queue):
            if queued is job:
                self._queue[index] = Purpose.DEVICE, order, submitted, job
                heapq.heapify(self._queue)
                return

    def finished(self) -> list[Outcome]:
        self._work()
        ready, self._ready = self._ready, []
        return ready

    def wait_idle(self, timeout_s: float) -> bool:
        return not self._reading

    def close(self) -> None:
        pass

    @property
    def next_event(self) -> float:
        """When it will have news; infinite if never."""
        if self._ready:
            return self._clock()
        return self._reading[0][0] if self._reading else math.inf

    def _work(self) -> None:
        """What the threads have done by now, in the order in which they did it."""
        while True:
            if self._queue and self._free:
                self._begin()
            elif self._reading and self._reading[0][0] <= self._clock():
                end, _, outcome = heapq.heappop(self._reading)
                self._ready.append(outcome)
                heapq.heappush(self._free, end)
            else:
                return

    def _begin(self) -> None:
        _, order, submitted, job = heapq.heappop(self._queue)
        begin = max(heapq.heappop(self._free), submitted)
        self.reads += 1
        weights = virtual_weights(job.key, self._rank_of(job.key), self._bytes_per_rank)
        seconds = self._model.read_s(weights.nbytes, len(self._reading) + 1)
        outcome = Outcome(job, (), weights=weights, seconds=seconds)
        heapq.heappush(self._reading, (begin + seconds, order, outcome))


@dataclass(frozen=True, eq=False)
class VirtualTransfer(Transfer):
    clock: Clock
    done_at: float

    def done(self) -> bool:
        return self.clock() >= self.done_at


class VirtualPool(DevicePool):
    """The real pool over torch's meta device: every book is kept, no byte is. One copy at a time goes to the device."""

    def __init__(
        self, clock: Clock, model: TimeModel, sites: list[LoraSite], budget_bytes: int, blocking: bool
    ) -> None:
        super().__init__(sites, budget_bytes, torch.bfloat16, "meta")
        self._clock = clock
        self._model = model
        self._blocking = blocking
        self._free_at = 0.0
        self._ends: deque[float] = deque()
        self.launched_until = 0.0
        """When the steps end that the device has been given so far: a copy begins after them, as the real one does."""

    def write(self, weights: AdapterWeights, slot: int, rank_start: int, extras_start: int = 0) -> Transfer:
        super().write(weights, slot, rank_start, extras_start)
        self._free_at = max(self._free_at, self._clock(), self.launched_until) + self._model.copy_s(weights.nbytes)
        self._ends.append(self._free_at)
        if self._blocking:
            self._clock.advance(self._free_at)
        return VirtualTransfer(weights, None, self._clock, self._free_at)

    def _copy(self, weights: AdapterWeights, rank_start: int) -> None:
        pass

    @property
    def next_event(self) -> float:
        """When the next copy is there; infinite if nothing is on its way."""
        while self._ends and self._ends[0] <= self._clock():
            self._ends.popleft()
        return self._ends[0] if self._ends else math.inf


def virtual_weights(name: str, rank: int, bytes_per_rank: int) -> AdapterWeights:
    """Weights that say what they take and hold nothing; the version is the name's, since content there is none."""
    nbytes = padded(rank) * bytes_per_rank
    return AdapterWeights(f"v-{name}", rank, (), (Buffer(torch.empty(0), (), nbytes),), no_effect=False)


def sites_of(shape: Shape = SHAPES["llama-3.1-8b"]) -> list[LoraSite]:
    """All seven linears of every layer, fused as the engine fuses them."""
    linears = shape.linears
    found = []
    for layer in range(shape.num_hidden_layers):
        for fused, names in FUSED.items():
            modules = tuple(f"model.layers.{layer}.{name}" for name in names)
            widths = tuple(linears[name][1] for name in names)
            found.append(LoraSite(f"model.layers.{layer}.{fused}", linears[names[0]][0], modules, widths))
    return found


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
