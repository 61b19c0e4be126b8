# SPDX-License-Identifier: Apache-2.0
"""What the engine tells front ends about itself."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from multilora_backend.core import StepPlan
from multilora_backend.protocol import Resident, Stats

if TYPE_CHECKING:
    from multilora_backend.adapters.manager import AdapterManager
    from multilora_backend.engine.engine import Engine

Place = tuple[str, int, bool]
"""Level, rank, pinned, as `AdapterStats.residents` has them."""


class Statistics:
    """Counts what happens between two reports. A report costs by what is resident, never by what is registered."""

    def __init__(self, adapters: AdapterManager) -> None:
        self.steps = 0
        self.adapters_per_step_max = 0
        self._adapters = adapters
        self._adapters_per_step: Counter[int] = Counter()
        self.adapter_waits: list[float] = []
        """Since the last report."""
        self._told: dict[str, Place] = {}
        """Where adapters were at the last report."""
        self._tell_all = True

    def launched(self, plan: StepPlan, now: float) -> None:
        """`now` is when the step was planned."""
        self.steps += 1
        count = len(plan.adapters)
        self._adapters_per_step[count] += 1
        self.adapters_per_step_max = max(self.adapters_per_step_max, count)
        for slot in plan.slots:
            sequence = slot.sequence
            if sequence.started == now and sequence.adapter:
                wait = self._adapters.active_since(sequence.adapter) - sequence.arrival
                if wait > 0:
                    self.adapter_waits.append(wait)

    def start_over(self) -> None:
        """Somebody listens who has heard nothing yet: the next report says all that is resident."""
        self._tell_all = True

    def collect(self, engine: Engine) -> Stats:
        """Gauges now, totals, and what happened since the last call."""
        scheduler, pages = engine.scheduler, engine.pages
        waiting = scheduler.lines.waiting_by_adapter
        adapters, resident = engine.adapters.stats(), engine.adapters.resident()
        per_step, self._adapters_per_step = self._adapters_per_step, Counter()
        waits, self.adapter_waits = self.adapter_waits, []
        complete, self._tell_all = self._tell_all, False
        residents = changes({} if complete else self._told, adapters.residents)
        self._told = adapters.residents
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_adapter=sum(
                len(line.waiting)
                for adapter, lines in waiting.items()
                if adapter and adapter not in resident
                for line in lines
            ),
            kv_cache_usage=pages.usage,
            adapters_by_state=adapters.by_state,
            max_loras=engine.config.max_loras,
            running_adapters=sorted(turn.adapter for turn in scheduler.turns.holders.values() if turn.running),
            waiting_adapters=sorted(filter(None, waiting)),
            steps_total=self.steps,
            preemptions_total=scheduler.preemptions,
            pauses_total=scheduler.pauses,
            handovers_total=scheduler.turns.handovers,
            num_paused=len(scheduler.paused),
            prefix_cache_queries_total=pages.queries,
            prefix_cache_hits_total=pages.hits,
            adapter_loads_total=adapters.loads_total,
            adapter_load_failures_total=adapters.load_failures_total,
            adapter_evictions_total=adapters.evictions_total,
            adapter_load_seconds=adapters.load_seconds,
            adapters_per_step=dict(per_step),
            adapters_per_step_max=self.adapters_per_step_max,
            adapter_arrivals=adapters.arrivals,
            adapter_wait_seconds=waits,
            residents=residents,
            residents_complete=complete,
            max_resident=adapters.max_resident,
            adapter_bytes=adapters.bytes,
            block_size=engine.config.block_size,
            num_kv_pages=pages.num_pages - 1,
        )


def changes(before: dict[str, Place], now: dict[str, Place]) -> list[Resident]:
    """What takes whoever knows `before` to `now`."""
    found = [Resident(key, *place) for key, place in now.items() if before.get(key) != place]
    return found + [Resident(key, "") for key in before.keys() - now.keys()]
