# SPDX-License-Identifier: Apache-2.0
"""Every time series of the custom metrics: vLLM's names where it has one, `multilora:` for the rest.

The series on residency (`vllm:*lora_adapter*` but for lora_requests_info) have the names and labels of vLLM's pull
request 54830, which adapter-aware routers are being built for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

BASE_LABELS = ("model", "version")
"""Of every series, as vllm_backend has them."""
MODEL_LENGTHS: tuple[float, ...] = ()
"""Buckets 1, 2, 5, 10, ... up to the model's context."""
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Series:
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    """Beside BASE_LABELS."""
    buckets: tuple[float, ...] = MODEL_LENGTHS
    """Of a histogram."""
    ends: bool = False
    """A gauge that says something by its labels: it ends when it is not so any more. Only the leader may have such."""


def _counter(description: str, *labels: str) -> Series:
    return Series("counter", description, labels)


def _gauge(description: str, *labels: str, ends: bool = False) -> Series:
    return Series("gauge", description, labels, ends=ends)


SERIES: dict[str, Series] = {
    # Requests
    "vllm:num_requests_running": _gauge("Sequences in the running batch."),
    "vllm:num_requests_waiting": _gauge("Sequences that wait, for memory or for their adapter."),
    "multilora:num_requests_waiting_adapter": _gauge("Sequences that wait for their adapter."),
    "multilora:num_requests_paused": _gauge(
        "Waiting sequences that ran, were stopped when their adapter's turn was over, and still have their KV pages."
    ),
    "vllm:prompt_tokens_total": _counter("Prompt tokens of requests that began to generate."),
    "vllm:generation_tokens_total": _counter("Generated tokens."),
    "vllm:request_success_total": _counter(
        "Sequences that ended, by reason; abort: the client went away.", "finished_reason"
    ),
    "multilora:request_failures_total": _counter("Requests answered with an error, by code.", "code"),
    "multilora:tenant_tokens_total": _counter(
        "Tokens served to a tenant, by kind: prompt (as vllm:prompt_tokens_total counts them) or generation.",
        "tenant",
        "kind",
    ),
    "vllm:time_to_first_token_seconds": Series(
        "histogram", "From a request's arrival to its first token.", buckets=FIRST_TOKEN_BUCKETS
    ),
    "multilora:adapter_time_to_first_token_seconds": Series(
        "histogram", "The same by the adapter that the request named.", ("adapter_name",), FIRST_TOKEN_BUCKETS
    ),
    "vllm:time_per_output_token_seconds": Series(
        "histogram",
        "Mean time between a request's tokens, one value a request.",
        buckets=(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    ),
    "vllm:e2e_request_latency_seconds": Series(
        "histogram",
        "From a request's arrival to its last token.",
        buckets=(1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    ),
    "vllm:request_prompt_tokens": Series("histogram", "Prompt tokens of a request."),
    "vllm:request_generation_tokens": Series("histogram", "Generated tokens of a request."),
    "vllm:request_params_n": Series("histogram", "The parameter n of a request.", buckets=(1, 2, 5, 10, 20)),
    # Memory
    "vllm:kv_cache_usage_perc": _gauge("KV pages held by running sequences over all pages, 0 to 1."),
    "vllm:cache_config_info": _gauge(
        "1; the labels say how the KV cache is cut.", "block_size", "num_gpu_blocks", ends=True
    ),
    "multilora:preemptions_total": _counter(
        "Sequences that lost their KV pages: they are moved to the host or computed again."
    ),
    "multilora:prefix_cache_queries_total": _counter(
        "Prompt tokens looked up in the prefix cache, once for each sequence that has started."
    ),
    "multilora:prefix_cache_hits_total": _counter("Prompt tokens found in the prefix cache."),
    # Adapters
    "vllm:lora_requests_info": _gauge(
        "Unix time of the last change; the labels say which adapters run and wait, and how many may run at once.",
        "max_lora",
        "running_lora_adapters",
        "waiting_lora_adapters",
        ends=True,
    ),
    "vllm:lora_adapter_loaded": _gauge(
        "1 for each adapter in memory, at level gpu, or cpu if only the host has it; gone when it is evicted.",
        "adapter_name",
        "level",
        "pinned",
        "rank",
        ends=True,
    ),
    "vllm:num_gpu_loaded_lora_adapters": _gauge("Adapters on the device."),
    "vllm:max_gpu_lora_adapters": _gauge("Adapters that the device holds if all have the mean rank of those there."),
    "vllm:lora_adapter_load_seconds": Series(
        "histogram", "Time from an adapter's request until it is on the device.", buckets=LOAD_BUCKETS
    ),
    "multilora:adapters": _gauge("Adapters that are registered, by state.", "state"),
    "multilora:adapter_bytes": _gauge("Bytes that adapters take, by level: device or host.", "level"),
    "multilora:adapter_budget_bytes": _gauge("Bytes that they may take.", "level"),
    "multilora:adapter_arrivals_total": _counter(
        "Sequences by where their adapter was when they came: device (a hit), host, or disk (a miss).", "level"
    ),
    "multilora:adapter_wait_seconds": Series(
        "histogram",
        "From a sequence's arrival until its adapter was on the device, if it was not.",
        buckets=LOAD_BUCKETS,
    ),
    "multilora:adapter_loads_total": _counter("Adapters loaded."),
    "multilora:adapter_load_failures_total": _counter("Adapters that could not be loaded."),
    "multilora:adapter_evictions_total": _counter("Adapters evicted from the device."),
    "multilora:pauses_total": _counter("Sequences that were stopped because their adapter's turn was over."),
    "multilora:handovers_total": _counter("Times that an adapter's turn ended for one that had waited too long."),
    "multilora:adapters_per_step": Series(
        "histogram",
        "Different adapters in one step of the engine.",
        buckets=(0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128),
    ),
    "multilora:adapters_per_step_max": _gauge("Most different adapters in one step since the engine's start."),
    # The engine
    "multilora:engine_up": _gauge("1 while the engine process serves."),
    "multilora:engine_restarts_total": _counter("Times that the engine process died."),
}


def reference() -> str:
    """The series as a Markdown table."""
    rows = ["| series | kind | labels | what it says |", "|---|---|---|---|"]
    for name, series in SERIES.items():
        labels = ", ".join(f"`{label}`" for label in series.labels)
        rows.append(f"| `{name}` | {series.kind} | {labels} | {series.description} |")
    return "\n".join(rows)


def buckets_for(series: Series, max_model_len: int) -> list[float]:
    return list(series.buckets or _one_two_five(max_model_len))


def _one_two_five(limit: int) -> Iterator[float]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power > limit:
                return
            yield factor * power
        power *= 10
