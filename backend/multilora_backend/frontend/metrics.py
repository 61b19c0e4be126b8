# SPDX-License-Identifier: Apache-2.0
"""Custom metrics on Triton's own endpoint: vLLM's names where it has one, `multilora:` for the rest.

Each update is a message to tritonserver (15 to 60 us), so what happens is only added up here and sent by `flush`, a
few times a second, on the outbox's thread. Of several front ends, only the leader reports what the engine says.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

from multilora_backend.core import FinishReason
from multilora_backend.errors import MultiloraError
from multilora_backend.frontend.outbox import Delivery, Outcome
from multilora_backend.protocol import Output, Stats

log = logging.getLogger(__name__)

COUNTERS = {
    "vllm:prompt_tokens_total": "Prompt tokens of requests that began to generate.",
    "vllm:generation_tokens_total": "Generated tokens.",
    "vllm:request_success_total": "Sequences that ended, by finished_reason; abort: the client went away.",
    "multilora:request_failures_total": "Requests answered with an error, by code.",
    "multilora:engine_restarts_total": "Times that the engine process died.",
    "multilora:preemptions_total": "Sequences that gave back their KV pages to be computed again.",
    "multilora:prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "multilora:prefix_cache_hits_total": "Prompt tokens found in the prefix cache.",
    "multilora:adapter_loads_total": "Adapters loaded.",
    "multilora:adapter_load_failures_total": "Adapters that could not be loaded.",
    "multilora:adapter_evictions_total": "Adapters evicted from the device.",
}
GAUGES = {
    "vllm:num_requests_running": "Sequences in the running batch.",
    "vllm:num_requests_waiting": "Sequences that wait, for memory or for their adapter.",
    "vllm:kv_cache_usage_perc": "KV pages held by running sequences over all pages, 0 to 1.",
    "vllm:lora_requests_info": "Unix time of the last change; the labels say which adapters run and wait.",
    "multilora:num_requests_waiting_adapter": "Sequences that wait for their adapter.",
    "multilora:adapters": "Adapters of the catalogue, by state.",
    "multilora:adapters_per_step_max": "Most different adapters in one step since the engine's start.",
    "multilora:engine_up": "1 while the engine process serves.",
}
HISTOGRAMS: dict[str, tuple[str, list[float]]] = {
    "vllm:time_to_first_token_seconds": (
        "From a request's arrival to its first token.",
        [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0],
    ),
    "vllm:time_per_output_token_seconds": (
        "Mean time between a request's tokens, one value a request.",
        [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5],
    ),
    "vllm:e2e_request_latency_seconds": (
        "From a request's arrival to its last token.",
        [1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0],
    ),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", []),
    "vllm:request_generation_tokens": ("Generated tokens of a request.", []),
    "vllm:request_params_n": ("The parameter n of a request.", [1, 2, 5, 10, 20]),
    "multilora:adapter_load_seconds": (
        "Time to read an adapter and bring it to the device.",
        [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
    ),
    "multilora:adapters_per_step": (
        "Different adapters in one step of the engine.",
        [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128],
    ),
}
"""Name -> (description, buckets); no buckets: 1, 2, 5, 10, ... up to the model's context."""

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """`engine` and `engine_lost` may be called by any thread, everything else by the outbox's."""

    def __init__(self, family: Any, model: str, version: str, max_model_len: int) -> None:
        """`family` is pb_utils.MetricFamily. Raises what it raises, for one if Triton's metrics are switched off."""
        self._base = {"model": model, "version": version}
        self._families: dict[str, Any] = {}
        self._buckets: dict[str, list[float]] = {}
        self._children: dict[tuple[str, Labels], Any] = {}
        for name, description in COUNTERS.items():
            self._families[name] = family(name=name, description=description, kind=family.COUNTER)
        for name, description in GAUGES.items():
            self._families[name] = family(name=name, description=description, kind=family.GAUGE)
        # An old Python backend has no histograms; everything else is still reported.
        for name, (description, buckets) in HISTOGRAMS.items() if hasattr(family, "HISTOGRAM") else ():
            self._families[name] = family(name=name, description=description, kind=family.HISTOGRAM)
            self._buckets[name] = list(buckets or _one_two_five(max_model_len))
        self._added: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._observed: deque[tuple[str, float]] = deque()
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._sent: dict[tuple[str, Labels], float] = {}
        self._reports: deque[tuple[Stats, bool] | None] = deque()
        self._totals: dict[str, int] = {}
        self._lora_info: Labels = ()

    def output(self, delivery: Delivery, output: Output, num_tokens: int, stopped: bool) -> None:
        """A delivery took in `num_tokens` tokens; `stopped` by a stop string."""
        if delivery.first_output == delivery.last_output and delivery.request is not None:
            self._observed.append(("vllm:time_to_first_token_seconds", delivery.first_output - delivery.arrival))
            self._add("vllm:prompt_tokens_total", len(delivery.request.prompt_token_ids))
        self._add("vllm:generation_tokens_total", num_tokens)
        reason = FinishReason.STOP if stopped else output.finish_reason
        if reason is not None and num_tokens:
            self._add("vllm:request_success_total", 1, ("finished_reason", reason.value))

    def closed(self, delivery: Delivery, outcome: Outcome, error: MultiloraError | None) -> None:
        if outcome is Outcome.CANCELLED:
            self._add("vllm:request_success_total", 1, ("finished_reason", FinishReason.ABORT.value))
        elif error is not None:
            self._add("multilora:request_failures_total", 1, ("code", error.code.value))
        request, builder = delivery.request, delivery.builder
        if outcome is not Outcome.FINISHED or request is None or builder is None:
            return
        tokens = builder.num_output_tokens
        per_sequence = tokens / request.sampling.n
        self._observed.append(("vllm:e2e_request_latency_seconds", time.monotonic() - delivery.arrival))
        self._observed.append(("vllm:request_prompt_tokens", len(request.prompt_token_ids)))
        self._observed.append(("vllm:request_generation_tokens", tokens))
        self._observed.append(("vllm:request_params_n", request.sampling.n))
        if per_sequence > 1:
            mean = (delivery.last_output - delivery.first_output) / (per_sequence - 1)
            self._observed.append(("vllm:time_per_output_token_seconds", mean))

    def engine(self, stats: Stats, leads: bool) -> None:
        self._reports.append((stats, leads))

    def engine_lost(self) -> None:
        self._reports.append(None)

    def flush(self) -> None:
        """Sends what has changed."""
        while self._reports:
            report = self._reports.popleft()
            if report is None:
                self._forget_engine()
            else:
                self._take(*report)
        added, self._added = self._added, defaultdict(float)
        for key, amount in added.items():
            if amount:
                self._child(*key).increment(amount)
        while self._observed:
            name, value = self._observed.popleft()
            if name in self._families:
                self._child(name, ()).observe(value)
        for key, value in self._gauges.items():
            if self._sent.get(key) != value:
                self._child(*key).set(value)
                self._sent[key] = value

    def _take(self, stats: Stats, leads: bool) -> None:
        for name in ("preemptions", "prefix_cache_queries", "prefix_cache_hits", *_ADAPTER_TOTALS):
            total = getattr(stats, f"{name}_total")
            # Followers keep count too, so that one that becomes the leader adds nothing twice.
            delta = total - self._totals.get(name, 0)
            self._totals[name] = total
            if leads:
                self._add(f"multilora:{name}_total", delta)
        if not leads:
            return
        for name, value in (
            ("multilora:engine_up", 1),
            ("vllm:num_requests_running", stats.num_running),
            ("vllm:num_requests_waiting", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", stats.kv_cache_usage),
            ("multilora:num_requests_waiting_adapter", stats.num_waiting_adapter),
            ("multilora:adapters_per_step_max", stats.adapters_per_step_max),
        ):
            self._gauges[name, ()] = value
        for state, count in stats.adapters_by_state.items():
            self._gauges["multilora:adapters", (("state", state),)] = count
        self._observed.extend(("multilora:adapter_load_seconds", seconds) for seconds in stats.adapter_load_seconds)
        for count, steps in stats.adapters_per_step.items():
            self._observed.extend([("multilora:adapters_per_step", count)] * steps)
        self._set_lora_info(
            (
                ("max_lora", str(stats.max_loras)),
                ("running_lora_adapters", ",".join(stats.running_adapters)),
                ("waiting_lora_adapters", ",".join(stats.waiting_adapters)),
            )
        )

    def _set_lora_info(self, labels: Labels) -> None:
        """What is said by labels changes by another series taking the old one's place."""
        if labels == self._lora_info:
            return
        old = "vllm:lora_requests_info", self._lora_info
        for table in (self._gauges, self._sent, self._children):
            table.pop(old, None)
        self._lora_info = labels
        self._gauges["vllm:lora_requests_info", labels] = time.time()

    def _forget_engine(self) -> None:
        """The next engine counts from nothing; until it serves, nothing runs."""
        self._totals.clear()
        if ("multilora:engine_up", ()) in self._gauges:
            self._add("multilora:engine_restarts_total", 1)
            for key in self._gauges:
                if key[0] != "vllm:lora_requests_info":
                    self._gauges[key] = 0.0

    def _add(self, name: str, amount: float, *labels: tuple[str, str]) -> None:
        self._added[name, labels] += amount

    def _child(self, name: str, labels: Labels) -> Any:
        key = name, labels
        if key not in self._children:
            arguments = {"buckets": self._buckets[name]} if name in self._buckets else {}
            self._children[key] = self._families[name].Metric(labels={**self._base, **dict(labels)}, **arguments)
        return self._children[key]


_ADAPTER_TOTALS = ("adapter_loads", "adapter_load_failures", "adapter_evictions")


def _one_two_five(limit: int) -> Iterator[float]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power > limit:
                return
            yield factor * power
        power *= 10
