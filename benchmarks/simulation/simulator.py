# SPDX-License-Identifier: Apache-2.0
"""The engine's loop in virtual time: the real scheduler, pages and adapter manager, and steps that only take time.

One turn is `Engine.step`: a step is scheduled while the one before it runs, and its tokens are known one turn later.
Nothing else takes time: the host's work is measured for the report, but the virtual clock does not see it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from multilora_backend.core import UNKNOWN_TOKEN, FinishReason, SamplingParams, Sequence, StepPlan
from simulation.assembly import Assembly, assemble
from simulation.model import TimeModel
from simulation.record import Record, Recorder
from simulation.workloads import Request

TICK_S = 0.01
"""How far an idle engine's clock goes when something waits for nothing but time (a rate limit, a back-off)."""
FULL = 0.98
"""Of max_num_seqs: a batch is never quite full, as sequences end in every step."""
STUCK_S = 120.0
"""Idle for so long with requests waiting, the engine is taken to be stuck."""


@dataclass(frozen=True)
class Setup:
    """What is simulated, apart from the traffic."""

    ranks: Mapping[str, int]
    """Adapter -> rank; all of them are registered."""
    resident: int
    """Rank-16 adapters that the device pool holds."""
    host_bytes: int = 4 * 2**30
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the engine's configuration that differ from its defaults."""
    first_come: bool = False
    """First come, first served with loads in the step loop, instead of the project's scheduler."""
    until: float = math.inf
    """When to stop; infinite: when the last request has ended."""
    watched: tuple[str, ...] = ()


@dataclass
class Run:
    setup: Setup
    recorder: Recorder
    seconds: float
    """Virtual."""
    preemptions: int
    loads: int
    """To the device."""
    reads: int
    """From disk."""
    evictions: int
    load_s: list[float]
    """Of each load, from when it was asked for until the adapter was there."""
    arrivals: Mapping[str, int]
    """Requests by where their adapter was when they came: device, host or disk."""
    cpu_s: float
    """Real, of the process that simulated."""


@dataclass(frozen=True)
class _Launched:
    plan: StepPlan
    end: float
    sampled: tuple[Sequence, ...]


P = ParamSpec("P")
T = TypeVar("T")
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def simulate(
    requests: list[Request],
    setup: Setup,
    model: TimeModel | None = None,
    between: Callable[[Assembly], None] = lambda parts: None,
) -> Run:
    """Plays the requests, in order of time, and calls `between` after each turn of the engine's loop.

    Raises RuntimeError if the engine is stuck or its books do not balance.
    """
    began = time.process_time()
    model = model or TimeModel.read()
    simulator = _Simulator(requests, setup, model, assemble(setup, model))
    simulator.run(between)
    parts = simulator.parts
    stats = parts.manager.stats()
    return Run(
        setup,
        simulator.recorder,
        parts.clock.now,
        parts.scheduler.preemptions,
        stats.loads_total,
        parts.loader.reads,
        stats.evictions_total,
        stats.load_seconds,
        stats.arrivals,
        time.process_time() - began,
    )


class _Simulator:
    def __init__(self, requests: list[Request], setup: Setup, model: TimeModel, parts: Assembly) -> None:
        self.parts = parts
        self.recorder = Recorder(setup.watched)
        self._setup = setup
        self._model = model
        self._requests: Iterator[Request] = iter(requests)
        self._next: Request | None = next(self._requests, None)
        self._in_flight: _Launched | None = None
        self._idle_since = math.inf
        self._host_s = 0.0
        """Since it was last written down: of the turn that is under way."""
        # Loads in the step loop mean that nothing is launched ahead: the device waits for them too.
        self._overlap = not setup.first_come

    def run(self, between: Callable[[Assembly], None]) -> None:
        parts, setup = self.parts, self._setup
        while (self._next is not None or parts.scheduler.has_work or self._in_flight) and parts.clock.now < setup.until:
            self._submit()
            self._turn()
            between(parts)
        if not parts.scheduler.has_work:
            parts.pages.check()
            if parts.pages.num_free != parts.pages.num_pages - 1:
                raise RuntimeError("idle, but pages are held")

    def _submit(self) -> None:
        now = self.parts.clock.now
        while self._next is not None and self._next.at <= now:
            request = self._next
            key = ("", len(self.recorder.records), 0)
            sequence = Sequence(
                key=key,
                prompt_len=request.prompt,
                token_ids=[0] * request.prompt,
                sampling=_GREEDY,
                seed=0,
                adapter=request.adapter,
                priority=request.priority,
                tenant=request.tenant,
                arrival=request.at,
                max_len=request.prompt + request.output,
            )
            self.recorder.submitted(request)
            self._on_host(self.parts.add, sequence)
            self._next = next(self._requests, None)

    def _turn(self) -> None:
        parts = self.parts
        self._on_host(parts.poll)
        plan = self._on_host(parts.scheduler.schedule, parts.clock.now)
        for adapter in self.recorder.watched:
            self.recorder.state(adapter, parts.clock.now, parts.state(adapter))
        launched = self._launch(plan) if plan.slots else None
        before, self._in_flight = self._in_flight, launched
        if before is not None:
            self._collect(before)
        if launched is not None and not self._overlap:
            self._in_flight = None
            self._collect(launched)
        if launched is None and before is None:
            self._wait()
        else:
            self._idle_since = math.inf
            self.recorder.host_s.append(self._host_s)
            if len(plan.slots) >= FULL * parts.scheduler.max_num_seqs:
                self.recorder.full_host_s.append(self._host_s)
            self._host_s = 0.0

    def _on_host(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Calls what is the scheduler's or the manager's, and counts the CPU time that it takes."""
        began = time.thread_time()
        result = work(*arguments, **named)
        self._host_s += time.thread_time() - began
        return result

    def _launch(self, plan: StepPlan) -> _Launched:
        now = self.parts.clock.now
        start = max(now, self.parts.pool.launched_until)
        end = self.parts.pool.launched_until = start + self._model.step_s(plan, self.parts.rank_of)
        sampled = []
        for slot in plan.slots:
            sequence = slot.sequence
            if slot.samples:
                sequence.token_ids.append(UNKNOWN_TOKEN)
                sampled.append(sequence)
            if not slot.start:  # its first step, as nothing is cached; or the first after a preemption
                record = self._record(sequence)
                if record.started == math.inf:
                    self.recorder.started(record, start)
        self.recorder.steps += 1
        self.recorder.busy_s += end - start
        self.recorder.adapters_in_steps += len(plan.adapters)
        return _Launched(plan, end, tuple(sampled))

    def _collect(self, launched: _Launched) -> None:
        parts, recorder = self.parts, self.recorder
        parts.clock.advance(launched.end)
        now = parts.clock.now
        for sequence in launched.sampled:
            record = self._record(sequence)
            recorder.token(record, now)
            if record.tokens == record.request.output:
                record.last = now
                self._on_host(parts.finish, sequence, FinishReason.LENGTH)
        self._on_host(parts.scheduler.publish, launched.plan)
        recorder.after_step(now)

    def _record(self, sequence: Sequence) -> Record:
        return self.recorder.records[sequence.key[1]]

    def _wait(self) -> None:
        """Nothing runs: on to whatever comes next."""
        clock = self.parts.clock
        arrival = self._next.at if self._next is not None else math.inf
        event = min(arrival, self.parts.next_event)
        if self.parts.scheduler.has_work:
            self._idle_since = min(self._idle_since, clock.now)
            if clock.now - self._idle_since > STUCK_S:
                raise RuntimeError(f"stuck at {clock.now:.1f} s: requests wait, and nothing runs or loads")
            event = min(event, clock.now + TICK_S)
        clock.advance(min(event, self._setup.until))
