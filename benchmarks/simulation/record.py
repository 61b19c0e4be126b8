# SPDX-License-Identifier: Apache-2.0
"""What is kept of a simulated run: every request's times, the service of each tenant over time, states of adapters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from simulation.workloads import Request

INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""Service of a prompt's token and of an answer's, as the VTC paper counts."""

SAMPLE_S = 0.1
"""Service is written down this often."""


@dataclass(slots=True)
class Record:
    """One request. Times are virtual seconds, infinite where it did not come to that."""

    request: Request
    started: float = math.inf
    """When a step first computed any of it."""
    first: float = math.inf
    last: float = math.inf
    """When its last token came."""
    tokens: int = 0

    @property
    def wait(self) -> float:
        return self.started - self.request.at

    @property
    def ttft(self) -> float:
        return self.first - self.request.at

    @property
    def done(self) -> bool:
        return self.last < math.inf


@dataclass
class Service:
    """One tenant's service, sampled: what it has had so far, and whether it had requests waiting all the while."""

    total: float = 0.0
    waiting: int = 0
    backlogged: bool = True
    """Since the last sample."""
    totals: list[float] = field(default_factory=list)
    always_backlogged: list[bool] = field(default_factory=list)


@dataclass
class Recorder:
    watched: tuple[str, ...] = ()
    """Adapters whose states are kept."""
    records: list[Record] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    services: dict[str, Service] = field(default_factory=dict)
    states: dict[str, list[tuple[float, str]]] = field(default_factory=lambda: defaultdict(list))
    """Adapter -> (when, state from then on)."""
    steps: int = 0
    busy_s: float = 0.0
    """Time in which the device ran a step."""
    adapters_in_steps: int = 0
    """Different adapters of each step, added up."""
    host_s: list[float] = field(default_factory=list)
    """Real CPU seconds that scheduler and manager took for each step, with what was submitted and what ended in it.

    Other work on the machine is not counted.
    """
    full_host_s: list[float] = field(default_factory=list)
    """The same, of steps whose batch was full."""
    _sample_at: float = 0.0

    def submitted(self, request: Request) -> Record:
        record = Record(request)
        self.records.append(record)
        if request.tenant not in self.services:  # it has had nothing and wanted nothing so far
            samples = len(self.times)
            totals, backlogged = [0.0] * samples, [False] * samples
            self.services[request.tenant] = Service(0.0, 0, not samples, totals, backlogged)
        self.services[request.tenant].waiting += 1
        return record

    def started(self, record: Record, now: float) -> None:
        record.started = now
        self.services[record.request.tenant].waiting -= 1

    def token(self, record: Record, now: float) -> None:
        """A prompt is counted whole with its first token; what is computed again is not service."""
        service = self.services[record.request.tenant]
        if not record.tokens:
            record.first = now
            service.total += INPUT_WEIGHT * record.request.prompt
        record.tokens += 1
        service.total += OUTPUT_WEIGHT

    def after_step(self, now: float) -> None:
        sample = now >= self._sample_at
        if sample:
            self._sample_at = now + SAMPLE_S
            self.times.append(now)
        for service in self.services.values():
            service.backlogged = service.backlogged and service.waiting > 0
            if sample:
                service.totals.append(service.total)
                service.always_backlogged.append(service.backlogged)
                service.backlogged = service.waiting > 0

    def state(self, adapter: str, now: float, state: str) -> None:
        line = self.states[adapter]
        if not line or line[-1][1] != state:
            line.append((now, state))


def service_difference(recorder: Recorder, one: str, other: str, weights: Mapping[str, float] | None = None) -> float:
    """The largest |service of one - service of the other| over any span in which both were backlogged throughout."""
    weights = weights or {}
    a, b = recorder.services[one], recorder.services[other]
    worst, low, high = 0.0, math.inf, -math.inf
    spans = zip(a.totals, b.totals, a.always_backlogged, b.always_backlogged, strict=True)
    for mine, theirs, mine_waits, theirs_waits in spans:
        difference = mine / weights.get(one, 1.0) - theirs / weights.get(other, 1.0)
        if not (mine_waits and theirs_waits):
            # This sample ends a span that was broken somewhere: the next span may begin with it.
            low = high = difference
            continue
        low, high = min(low, difference), max(high, difference)
        worst = max(worst, high - low)
    return worst


def percentile(values: Iterable[float], percent: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else 0.0
