# SPDX-License-Identifier: Apache-2.0
"""Custom metrics of requests: what they count, when, and by whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import pytest

from fake_metrics import FakeTriton
from frontend_fakes import FakeSender
from multilora_backend.core import FinishReason
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.metrics import Metrics
from multilora_backend.frontend.outbox import Delivery, Outcome
from multilora_backend.frontend.response import ResponseBuilder
from multilora_backend.protocol import Output


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


def test_a_python_backend_without_histograms_still_counts(triton, delivery):
    metrics = Metrics(triton.family(histograms=False), "multilora", "1", 64)
    feed(metrics, delivery(), 101.0, Output(1, 0, [70]))
    metrics.flush()
    assert triton["vllm:generation_tokens_total"] == 1
    assert not triton.observed


def test_first_tokens_by_adapter_and_tokens_by_tenant_are_bounded(triton, delivery):
    metrics = Metrics(triton.family(), "multilora", "1", 64, adapters=2, tenants=1)
    for adapter, tenant in (("a", "x"), ("b@2", "y"), ("c", "z"), ("a", "x"), ("", "")):
        request = delivery(max_tokens=20)
        request.request = dataclasses.replace(request.request, adapter=adapter, tenant=tenant)
        feed(metrics, request, 100.25, Output(1, 0, [70, 71]))
        feed(metrics, request, 100.5, Output(1, 0, [72]))
    metrics.flush()
    name = "multilora:adapter_time_to_first_token_seconds"
    labels = [frozenset(labels.items()) for labels in triton.series(name)]
    seen = {dict(label)["adapter_name"]: triton.observed_by[name, label] for label in labels}
    assert seen == {"a": [0.25, 0.25], "b": [0.25], "__other__": [0.25, 0.25]}
    prompt = len(request.request.prompt_token_ids)
    tokens = "multilora:tenant_tokens_total"
    assert triton.labelled(tokens, tenant="x", kind="generation") == 6
    assert triton.labelled(tokens, tenant="__other__", kind="generation") == 9
    assert triton.labelled(tokens, tenant="x", kind="prompt") == 2 * prompt
    assert triton["vllm:generation_tokens_total"] == 15


def test_requests_without_adapter_or_tenant_have_names_that_no_adapter_can_have(metrics, triton, delivery):
    feed(metrics, delivery(), 101.0, Output(1, 0, [70]))
    metrics.flush()
    assert triton.series("multilora:adapter_time_to_first_token_seconds") == [{"adapter_name": "__base__"}]
    assert {labels["tenant"] for labels in triton.series("multilora:tenant_tokens_total")} == {"__none__"}
