# SPDX-License-Identifier: Apache-2.0
"""Custom metrics of the engine: what a router reads, and that several front ends count nothing twice."""

from __future__ import annotations

import msgspec
import pytest

from fake_metrics import FakeTriton
from multilora_backend.frontend.metrics import Metrics
from multilora_backend.protocol import Resident, Stats

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
    adapter_arrivals={"device": 7, "host": 2, "disk": 1},
    adapter_wait_seconds=[0.004],
    residents=[Resident("a", "device", 16, True), Resident("b", "device", 8), Resident("c", "host", 64)],
    residents_complete=True,
    max_resident=12,
    adapter_bytes={"device": (24, 100), "host": (88, 200)},
    block_size=16,
    num_kv_pages=99,
)


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def metrics(triton: FakeTriton) -> Metrics:
    return Metrics(triton.family(), "multilora", "1", 64)


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
    assert triton.observed["vllm:lora_adapter_load_seconds"] == [0.25, 0.5]
    assert triton.observed["multilora:adapters_per_step"] == [0, 2, 2, 2]


def test_what_does_not_change_is_not_sent_again(metrics, triton):
    metrics.engine(STATS, leads=True)
    metrics.flush()
    sent = triton.messages
    again = {"adapter_load_seconds": [], "adapters_per_step": {}, "adapter_wait_seconds": []}
    metrics.engine(msgspec.structs.replace(STATS, **again), leads=True)
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
    assert len(triton.observed["vllm:lora_adapter_load_seconds"]) == 4, "2 by each leader, none by the follower"


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
    for running in (["a", "b"], ["b"], ["b"], []):
        metrics.engine(msgspec.structs.replace(STATS, running_adapters=running), leads=True)
        metrics.flush()
        [labels] = triton.series("vllm:lora_requests_info")
        assert labels == {
            "max_lora": "4",
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": "c",
        }
        assert triton.values["vllm:lora_requests_info", frozenset(labels.items())] > 1e9


def loaded(triton: FakeTriton) -> dict[str, str]:
    """Level of each adapter as vllm:lora_adapter_loaded has it."""
    series = triton.series("vllm:lora_adapter_loaded")
    assert len({labels["adapter_name"] for labels in series}) == len(series)
    return {labels["adapter_name"]: labels["level"] for labels in series}


def told(*residents: Resident, complete: bool = False) -> Stats:
    return msgspec.structs.replace(STATS, residents=list(residents), residents_complete=complete)


def test_residency_has_vllms_names_and_labels(metrics, triton):
    metrics.engine(STATS, leads=True)
    metrics.flush()
    assert triton.series("vllm:lora_adapter_loaded") == [
        {"adapter_name": "a", "level": "gpu", "pinned": "true", "rank": "16"},
        {"adapter_name": "b", "level": "gpu", "pinned": "false", "rank": "8"},
        {"adapter_name": "c", "level": "cpu", "pinned": "false", "rank": "64"},
    ]
    assert triton.labelled("vllm:lora_adapter_loaded", adapter_name="c", level="cpu", pinned="false", rank="64") == 1
    assert triton["vllm:num_gpu_loaded_lora_adapters"] == 2
    assert triton["vllm:max_gpu_lora_adapters"] == 12
    assert triton.labelled("vllm:cache_config_info", block_size="16", num_gpu_blocks="99") == 1
    assert triton.labelled("multilora:adapter_bytes", level="host") == 88
    assert triton.labelled("multilora:adapter_budget_bytes", level="device") == 100
    assert triton.labelled("multilora:adapter_arrivals_total", level="host") == 2
    assert triton.observed["multilora:adapter_wait_seconds"] == [0.004]


def test_residency_follows_changes_and_a_complete_list_replaces_all(metrics, triton):
    for stats, expected in (
        (STATS, {"a": "gpu", "b": "gpu", "c": "cpu"}),
        (told(Resident("a", "host", 16)), {"a": "cpu", "b": "gpu", "c": "cpu"}),
        (told(Resident("c", "")), {"a": "cpu", "b": "gpu"}),
        (told(), {"a": "cpu", "b": "gpu"}),
        (told(Resident("d", "device", 4), complete=True), {"d": "gpu"}),
        (told(complete=True), {}),
    ):
        metrics.engine(stats, leads=True)
        metrics.flush()
        assert loaded(triton) == expected
        assert triton["vllm:num_gpu_loaded_lora_adapters"] == list(expected.values()).count("gpu")


def test_a_new_revision_beside_the_old_is_one_name(metrics, triton):
    metrics.engine(told(Resident("a", "device", 16), Resident("a@2", "device", 16), complete=True), leads=True)
    metrics.flush()
    assert loaded(triton) == {"a": "gpu"}
    metrics.engine(told(Resident("a", "")), leads=True)
    metrics.flush()
    assert loaded(triton) == {"a": "gpu"}
    busy = msgspec.structs.replace(told(), running_adapters=["a", "a@2", "b@7"], waiting_adapters=["a@3"])
    metrics.engine(busy, leads=True)
    metrics.flush()
    [labels] = triton.series("vllm:lora_requests_info")
    assert (labels["running_lora_adapters"], labels["waiting_lora_adapters"]) == ("a,b", "a")


def test_a_follower_that_becomes_the_leader_knows_what_is_resident(metrics, triton):
    metrics.engine(STATS, leads=False)
    metrics.engine(told(Resident("b", "")), leads=False)
    metrics.flush()
    assert loaded(triton) == {}
    metrics.engine(told(), leads=True)
    metrics.flush()
    assert loaded(triton) == {"a": "gpu", "c": "cpu"}


def test_when_the_engine_is_lost_so_is_what_was_resident(metrics, triton):
    metrics.engine(STATS, leads=True)
    metrics.flush()
    info = triton.series("vllm:lora_requests_info")
    metrics.engine_lost()
    metrics.flush()
    assert loaded(triton) == {}
    assert triton["vllm:num_gpu_loaded_lora_adapters"] == 0
    # These say something by their labels, and 0 would be no time and no answer.
    assert triton.labelled("vllm:cache_config_info", block_size="16", num_gpu_blocks="99") == 1
    assert triton.values["vllm:lora_requests_info", frozenset(info[0].items())] > 1e9
    metrics.engine(told(Resident("z", "device", 8)), leads=True)
    metrics.flush()
    assert loaded(triton) == {"z": "gpu"}


def test_a_router_hears_how_many_adapters_may_run_when_nothing_bounds_them_but_memory(metrics, triton):
    metrics.engine(msgspec.structs.replace(STATS, max_loras=0), leads=True)
    metrics.flush()
    assert triton.series("vllm:lora_requests_info")[0]["max_lora"] == "12"
