# SPDX-License-Identifier: Apache-2.0
"""What the engine says about itself, as metrics. Of several front ends, only the leader reports it."""

from __future__ import annotations

import time

from multilora_backend.core import adapter_name
from multilora_backend.frontend.meters import Labels, Meters
from multilora_backend.protocol import Resident, Stats

_TOTALS = (
    "preemptions",
    "pauses",
    "handovers",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "adapter_loads",
    "adapter_load_failures",
    "adapter_evictions",
)
_LEVELS = {"device": "gpu", "host": "cpu"}
"""Ours, and what vLLM's series call them."""
_INFO = "vllm:lora_requests_info"
_LOADED = "vllm:lora_adapter_loaded"


class EngineMetrics:
    """Followers keep count too, so that one that becomes the leader adds nothing twice and knows what is resident."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._totals: dict[str, int] = {}
        self._residents: dict[str, Resident] = {}
        self._led = False
        self._info: Labels = ()

    def take(self, stats: Stats, leads: bool) -> None:
        for name in _TOTALS:
            self._count(f"multilora:{name}_total", getattr(stats, f"{name}_total"), leads)
        for level, total in stats.adapter_arrivals.items():
            self._count("multilora:adapter_arrivals_total", total, leads, ("level", level))
        changed = self._update_residents(stats)
        if leads:
            self._set_gauges(stats)
            self._observe(stats)
            if changed or not self._led:
                self._set_residents()
            self._set_requests_info(stats)
        self._led = leads

    def lost(self) -> None:
        """The next engine counts from nothing; until it serves, nothing runs and nothing is resident."""
        self._totals.clear()
        self._residents.clear()
        if self._meters.get("multilora:engine_up") is not None:
            self._meters.add("multilora:engine_restarts_total", 1)
            self._meters.replace(_LOADED, {})
            self._meters.clear(_INFO, "vllm:cache_config_info")

    def _count(self, name: str, total: int, leads: bool, *labels: tuple[str, str]) -> None:
        key = name + "".join(value for _, value in labels)
        delta = total - self._totals.get(key, 0)
        self._totals[key] = total
        if leads:
            self._meters.add(name, delta, *labels)

    def _set_gauges(self, stats: Stats) -> None:
        for name, value in (
            ("multilora:engine_up", 1),
            ("vllm:num_requests_running", stats.num_running),
            ("vllm:num_requests_waiting", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", stats.kv_cache_usage),
            ("vllm:num_gpu_loaded_lora_adapters", sum(r.level == "device" for r in self._residents.values())),
            ("vllm:max_gpu_lora_adapters", stats.max_resident),
            ("multilora:num_requests_waiting_adapter", stats.num_waiting_adapter),
            ("multilora:num_requests_paused", stats.num_paused),
            ("multilora:adapters_per_step_max", stats.adapters_per_step_max),
        ):
            self._meters.set(name, value)
        for state, count in stats.adapters_by_state.items():
            self._meters.set("multilora:adapters", count, ("state", state))
        for level, (taken, budget) in stats.adapter_bytes.items():
            self._meters.set("multilora:adapter_bytes", taken, ("level", level))
            self._meters.set("multilora:adapter_budget_bytes", budget, ("level", level))
        shape = ("block_size", str(stats.block_size)), ("num_gpu_blocks", str(stats.num_kv_pages))
        self._meters.replace("vllm:cache_config_info", {shape: 1})

    def _observe(self, stats: Stats) -> None:
        for seconds in stats.adapter_load_seconds:
            self._meters.observe("vllm:lora_adapter_load_seconds", seconds)
        for seconds in stats.adapter_wait_seconds:
            self._meters.observe("multilora:adapter_wait_seconds", seconds)
        for count, steps in stats.adapters_per_step.items():
            for _ in range(steps):
                self._meters.observe("multilora:adapters_per_step", count)

    def _update_residents(self, stats: Stats) -> bool:
        if stats.residents_complete:
            self._residents.clear()
        for resident in stats.residents:
            if resident.level:
                self._residents[resident.key] = resident
            else:
                self._residents.pop(resident.key, None)
        return bool(stats.residents) or stats.residents_complete

    def _set_residents(self) -> None:
        # Two revisions of a name may differ in nothing that a label says: then they are one series.
        self._meters.replace(_LOADED, {_loaded_labels(resident): 1 for resident in self._residents.values()})

    def _set_requests_info(self, stats: Stats) -> None:
        """What is said by labels changes by another series taking the old one's place."""
        labels = (
            ("max_lora", str(stats.max_loras or stats.max_resident)),
            ("running_lora_adapters", _names(stats.running_adapters)),
            ("waiting_lora_adapters", _names(stats.waiting_adapters)),
        )
        if labels != self._info:
            self._info = labels
            self._meters.replace(_INFO, {labels: time.time()})


def _loaded_labels(resident: Resident) -> Labels:
    return (
        ("adapter_name", adapter_name(resident.key)),
        ("level", _LEVELS[resident.level]),
        ("pinned", str(resident.pinned).lower()),
        ("rank", str(resident.rank)),
    )


def _names(keys: list[str]) -> str:
    """As clients know them: several revisions of an adapter are one name."""
    return ",".join(dict.fromkeys(map(adapter_name, keys)))
