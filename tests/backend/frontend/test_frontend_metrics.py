# SPDX-License-Identifier: Apache-2.0
"""Custom metrics: what they count, and that several front ends count nothing twice."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable

import msgspec
import pytest

from frontend_fakes import FakeSender
from multilora_backend.core import FinishReason
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metrics
from multilora_backend.frontend.outbox import Delivery, Outcome
from multilora_backend.frontend.response import ResponseBuilder
from multilora_backend.protocol import Output, Stats

BASE = {"model": "multilora", "version": "1"}


class FakeTriton:
    """Triton's registry: one value for a name and labels, whichever front end's object it is that changes it."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset], float] = {}
        self.observed: dict[str, list[float]] = {}
        self.buckets: dict[str, list[float]] = {}
        self.messages = 0
        self.alive: weakref.WeakSet = weakref.WeakSet()

    def family(self, histograms: bool = True) -> type:
        triton = self

        class Metric:
            def __init__(self, name: str, labels: dict[str, str]) -> None:
                assert labels.items() >= BASE.items()
                self.name, self.labels = name, frozenset(labels.items() - BASE.items())
                self.key = self.name, self.labels
                triton.alive.add(self)

            def increment(self, amount: float) -> None:
                assert amount > 0
                triton.messages += 1
                triton.values[self.key] = triton.values.get(self.key, 0) + amount

            def set(self, value: float) -> None:
                triton.messages += 1
                triton.values[self.key] = value

            def observe(self, value: float) -> None:
                triton.messages += 1
                triton.observed.setdefault(self.name, []).append(value)

        class MetricFamily:
            COUNTER, GAUGE = range(2)

            def __init__(self, name: str, description: str, kind: int) -> None:
                assert description.endswith(".")
                self.name, self.kind = name, kind

            def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:
                assert (buckets is None) == (self.kind != 2)
                if buckets is not None:
                    assert buckets == sorted(buckets)
                    triton.buckets[self.name] = buckets
                return Metric(self.name, labels)

        if histograms:
            MetricFamily.HISTOGRAM = 2  # type: ignore[attr-defined]
        return MetricFamily

    def __getitem__(self, name: str) -> float:
        return self.values[name, frozenset()]

    def labelled(self, name: str, **labels: str) -> float:
        return self.values[name, frozenset(labels.items())]


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def metrics(triton: FakeTriton) -> Metrics:
    return Metrics(triton.family(), "multilora", "1", 64)


@pytest.fixture
def delivery(parse, tokenizers) -> Callable[..., Delivery]:
    def make(arrival: float = 100.0, **parameters: object) -> Delivery:
        request = parse(parameters, text_input="abc", stream=True)
        builder = ResponseBuilder(request, tokenizers["byte_level"])
        return Delivery(1, FakeSender(), request, builder, arrival)

    return make


def feed(metrics: Metrics, delivery: Delivery, at: float, output: Output) -> None:
    """As the outbox does."""
    before = delivery.builder.num_output_tokens
    stopped = delivery.builder.add(output)
    delivery.last_output = at
    delivery.first_output = delivery.first_output or at
    metrics.output(delivery, output, delivery.builder.num_output_tokens - before, bool(stopped))


STATS = Stats(
    num_running=3,
    num_waiting=2,
    num_waiting_adapter=1,
    kv_cache_usage=0.5,
    adapters_by_state={"ACTIVE": 2, "COLD": 5},
    max_loras=4,
    running_adapters=["a", "b"],
    waiting_adapters=["c"],
    steps_total=10,
    preemptions_total=1,
    prefix_cache_queries_total=30,
    prefix_cache_hits_total=10,
    adapter_loads_total=2,
    adapter_load_failures_total=0,
    adapter_evictions_total=0,
    adapter_load_seconds=[0.25, 0.5],
    adapters_per_step={0: 1, 2: 3},
    adapters_per_step_max=2,
)


def test_a_request_is_counted_and_timed(metrics, triton, delivery):
    request = delivery(max_tokens=20)
    feed(metrics, request, 100.5, Output(1, 0, [70]))
    feed(metrics, request, 101.0, Output(1, 0, [71, 72]))
    feed(metrics, request, 102.0, Output(1, 0, [73], finish_reason=FinishReason.LENGTH))
    metrics.closed(request, Outcome.FINISHED, None)
    assert triton.messages == 0, "updates must be batched"
    metrics.flush()
    prompt = len(request.request.prompt_token_ids)
    assert triton["vllm:prompt_tokens_total"] == prompt
    assert triton["vllm:generation_tokens_total"] == 4
    assert triton.labelled("vllm:request_success_total", finished_reason="length") == 1
    assert triton.observed["vllm:time_to_first_token_seconds"] == [0.5]
    assert triton.observed["vllm:time_per_output_token_seconds"] == [0.5]
    assert triton.observed["vllm:request_prompt_tokens"] == [prompt]
    assert triton.observed["vllm:request_generation_tokens"] == [4]
    assert triton.observed["vllm:request_params_n"] == [1]
    assert len(triton.observed["vllm:e2e_request_latency_seconds"]) == 1
    assert triton.buckets["vllm:request_prompt_tokens"] == [1, 2, 5, 10, 20, 50]
    assert triton.buckets["vllm:request_params_n"] == [1, 2, 5, 10, 20]


def test_each_sequence_of_n_ends_once_also_by_a_stop_string(metrics, triton, delivery, tokenizers):
    request = delivery(n=2, max_tokens=20)
    tokenizer = tokenizers["byte_level"]
    sampling = msgspec.structs.replace(request.request.sampling, stop=("d",))
    request.builder = ResponseBuilder(dataclasses.replace(request.request, sampling=sampling), tokenizer)
    (d,), (x,) = (tokenizer.encode(letter, add_special_tokens=False) for letter in "dx")
    feed(metrics, request, 101.0, Output(1, 0, [d]))
    feed(metrics, request, 101.5, Output(1, 0, [x], finish_reason=FinishReason.LENGTH))  # it came too late
    feed(metrics, request, 102.0, Output(1, 1, [x], finish_reason=FinishReason.LENGTH))
    metrics.flush()
    assert triton.labelled("vllm:request_success_total", finished_reason="stop") == 1
    assert triton.labelled("vllm:request_success_total", finished_reason="length") == 1
    assert triton["vllm:generation_tokens_total"] == 2
    assert len(triton.observed["vllm:time_to_first_token_seconds"]) == 1


def test_errors_and_cancelled_requests_are_no_latencies(metrics, triton, delivery):
    metrics.closed(delivery(), Outcome.CANCELLED, MultiloraError(ErrorCode.CANCELLED, "gone"))
    metrics.closed(Delivery(0, FakeSender()), Outcome.FAILED, MultiloraError(ErrorCode.INVALID_ARG, "bad"))
    metrics.flush()
    assert triton.labelled("vllm:request_success_total", finished_reason="abort") == 1
    assert triton.labelled("multilora:request_failures_total", code="INVALID_ARG") == 1
    assert not triton.observed


def test_the_engine_is_reported(metrics, triton):
    metrics.engine(STATS, leads=True)
    metrics.flush()
    assert triton["vllm:num_requests_running"] == 3
    assert triton["vllm:num_requests_waiting"] == 2
    assert triton["vllm:kv_cache_usage_perc"] == 0.5
    assert triton["multilora:num_requests_waiting_adapter"] == 1
    assert triton["multilora:adapters_per_step_max"] == 2
    assert triton.labelled("multilora:adapters", state="COLD") == 5
    assert triton["multilora:prefix_cache_queries_total"] == 30
    assert triton["multilora:adapter_loads_total"] == 2
    assert triton.observed["multilora:adapter_load_seconds"] == [0.25, 0.5]
    assert triton.observed["multilora:adapters_per_step"] == [0, 2, 2, 2]


def test_what_does_not_change_is_not_sent_again(metrics, triton):
    metrics.engine(STATS, leads=True)
    metrics.flush()
    sent = triton.messages
    metrics.engine(msgspec.structs.replace(STATS, adapter_load_seconds=[], adapters_per_step={}), leads=True)
    metrics.flush()
    assert triton.messages == sent


def test_a_follower_reports_nothing_and_as_the_new_leader_only_what_is_new(triton):
    leader, follower = (Metrics(triton.family(), "multilora", "1", 64) for _ in range(2))
    for metrics, leads in ((leader, True), (follower, False)):
        metrics.engine(STATS, leads)
        metrics.flush()
    assert triton["multilora:preemptions_total"] == 1
    follower.engine(msgspec.structs.replace(STATS, preemptions_total=4, num_running=9), leads=True)
    follower.flush()
    assert triton["multilora:preemptions_total"] == 4
    assert triton["vllm:num_requests_running"] == 9
    assert len(triton.observed["multilora:adapter_load_seconds"]) == 4, "2 by each leader, none by the follower"


def test_after_the_engines_death_nothing_runs_and_totals_go_on(metrics, triton):
    metrics.engine(STATS, leads=True)
    metrics.flush()
    metrics.engine_lost()
    metrics.flush()
    assert triton["multilora:engine_up"] == 0
    assert triton["vllm:num_requests_running"] == 0
    assert triton["multilora:engine_restarts_total"] == 1
    metrics.engine(msgspec.structs.replace(STATS, adapter_loads_total=1), leads=True)
    metrics.flush()
    assert triton["multilora:engine_up"] == 1
    assert triton["multilora:adapter_loads_total"] == 3


def test_running_adapters_are_labels_of_one_series_at_a_time(metrics, triton):
    def series() -> list[frozenset]:
        gc.collect()
        return [metric.labels for metric in triton.alive if metric.name == "vllm:lora_requests_info"]

    for running in (["a", "b"], ["b"], ["b"], []):
        metrics.engine(msgspec.structs.replace(STATS, running_adapters=running), leads=True)
        metrics.flush()
        [labels] = series()
        assert dict(labels) == {
            "max_lora": "4",
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": "c",
        }
        assert triton.values["vllm:lora_requests_info", labels] > 1e9


def test_a_python_backend_without_histograms_still_counts(triton, delivery):
    metrics = Metrics(triton.family(histograms=False), "multilora", "1", 64)
    feed(metrics, delivery(), 101.0, Output(1, 0, [70]))
    metrics.engine(STATS, leads=True)
    metrics.flush()
    assert triton["vllm:generation_tokens_total"] == 1
    assert not triton.observed


def test_names_are_unique_and_buckets_ascend():
    names = [*COUNTERS, *GAUGES, *HISTOGRAMS]
    assert len(names) == len(set(names))
    assert all(name.endswith("_total") for name in COUNTERS)
    assert all(buckets == sorted(set(buckets)) for _, buckets in HISTOGRAMS.values())
