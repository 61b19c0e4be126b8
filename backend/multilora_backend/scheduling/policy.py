# SPDX-License-Identifier: Apache-2.0
"""Who is next: the four strategies, their settings, and how they compose. Pure functions of a line and the time.

Admission, where a seat in the batch is free and the adapter is there, goes by `rank`: classes by their counters
(priority), then tenants and their adapters by theirs (fair share), late requests first among a tenant's. Adapter
slots, where there are fewer than adapters, go by `due`: whoever has waited longest, in units that the class scales
(adapter-first, with aging). Preloading orders nothing; see `scheduling.preload`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multilora_backend.core import adapter_name
from multilora_backend.errors import invalid

if TYPE_CHECKING:
    from multilora_backend.config import Config
    from multilora_backend.scheduling.lines import Line
    from multilora_backend.scheduling.tenants import SlaClass, Tenant

STRATEGIES = ("adapter_first", "fair_share", "priority", "preload")
URGENT_S = 0.5
"""So long before its deadline a request goes first among its tenant's."""

LIGHTEST = 1 / 64
"""Of a class's weight, where it makes requests wait for a slot: nobody is overtaken for longer than by this."""


@dataclass(frozen=True)
class Policy:
    """The strategies that are on, and their settings. With none of them it is first come, first served."""

    adapter_first: bool = True
    """Without it, residents overtake nobody: a request is overdue as soon as it comes."""
    fair_share: bool = True
    priority: bool = True
    preload: bool = True
    max_overtake_s: float = 2.0
    """How long requests of resident adapters may overtake one whose adapter must be loaded, in a class of weight 1."""
    tenure_s: float = 2.0
    """How long an adapter may keep its slot when one that is overdue has none."""
    input_weight: float = 1.0
    """Service of a prompt token."""
    output_weight: float = 2.0
    """Service of an output token: VTC's weights, from how long they take."""

    @classmethod
    def from_config(cls, config: Config) -> Policy:
        """Raises MultiloraError if `strategies` names an unknown one."""
        named = [name.strip() for name in config.strategies.split(",") if name.strip()]
        unknown = [name for name in named if name not in STRATEGIES]
        if unknown:
            raise invalid("strategies", f"unknown {', '.join(unknown)}; known are {', '.join(STRATEGIES)}")
        return cls(
            **{name: name in named for name in STRATEGIES},
            max_overtake_s=config.max_overtake_s,
            tenure_s=config.tenure_s,
            input_weight=config.fair_input_weight,
            output_weight=config.fair_output_weight,
        )

    def accounts(self, sla: SlaClass, tenant: Tenant, adapter: str) -> list[tuple[str, float]]:
        """Names and weights of the accounts that a line's service is charged to, from the top."""
        levels = [(sla.name, sla.weight)] if self.priority else []
        return [*levels, (tenant.name, tenant.weight), (adapter_name(adapter), 1.0)]

    def rank(self, line: Line, now: float) -> tuple[float, ...]:
        """Smaller is admitted sooner. Of a line with something waiting; its head is meant. See `scheduling.ready`."""
        group = (line.path[0].served, -line.path[0].weight) if self.priority else ()
        return *group, self.tenant_rank(line), *self.line_rank(line, now)

    def tenant_rank(self, line: Line) -> float:
        """Of its tenant within a class."""
        return line.path[-2].served if self.fair_share else 0.0

    def line_rank(self, line: Line, now: float) -> tuple[float, ...]:
        """Of itself within a tenant."""
        head = line.head
        served = line.path[-1].served if self.fair_share else 0.0
        if not self.priority:
            return served, head.arrival
        patient = head.started is not None or head.deadline - now > URGENT_S
        return patient, served, head.arrival

    def due(self, line: Line, left: float) -> float:
        """When a line becomes overdue for an adapter slot; the smallest gets the next one.

        `left` is when its adapter last lost its slot, -inf if it did not lately. What was paused then waits since then.
        What has never run waits since it came, but at most `seniority_s` longer than that: however old the requests
        are that somebody has flooded us with, the adapters of others have their turns.
        """
        overtake = self.max_overtake_s / max(self.weight(line), LIGHTEST) if self.adapter_first else 0.0
        due = math.inf
        if len(line.fresh) < len(line.waiting):
            due = max(line.head.arrival, left) + overtake
        if line.fresh:
            oldest = next(iter(line.fresh.values()))
            due = min(due, max(oldest.arrival, left - self.seniority_s) + overtake)
            if self.priority:
                due = min(due, oldest.deadline)
        return due

    @property
    def seniority_s(self) -> float:
        return 2 * self.tenure_s

    def weight(self, line: Line) -> float:
        return line.sla.weight if self.priority else 1.0


NEVER = -math.inf
