# SPDX-License-Identifier: Apache-2.0
"""What the engine tells front ends about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from multilora_backend.core import SequenceStatus
from multilora_backend.protocol import Stats

if TYPE_CHECKING:
    from multilora_backend.engine.engine import Engine


def collect_stats(engine: Engine, adapters_per_step: dict[int, int]) -> Stats:
    """Gauges now and totals; `adapters_per_step` counts the steps since the last call by their adapters."""
    scheduler, pages = engine.scheduler, engine.pages
    waiting = scheduler.waiting.values()
    adapters = engine.adapters.stats()
    return Stats(
        num_running=len(scheduler.running),
        num_waiting=len(waiting),
        num_waiting_adapter=sum(s.status is SequenceStatus.WAITING_ADAPTER for s in waiting),
        kv_cache_usage=pages.usage,
        adapters_by_state=adapters.by_state,
        max_loras=engine.config.max_loras,
        running_adapters=sorted({s.adapter for s in scheduler.running.values() if s.adapter}),
        waiting_adapters=sorted({s.adapter for s in waiting if s.adapter}),
        steps_total=engine.steps,
        preemptions_total=scheduler.preemptions,
        prefix_cache_queries_total=pages.queries,
        prefix_cache_hits_total=pages.hits,
        adapter_loads_total=adapters.loads_total,
        adapter_load_failures_total=adapters.load_failures_total,
        adapter_evictions_total=adapters.evictions_total,
        adapter_load_seconds=adapters.load_seconds,
        adapters_per_step=adapters_per_step,
        adapters_per_step_max=engine.adapters_per_step_max,
    )
