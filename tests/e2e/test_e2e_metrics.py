# SPDX-License-Identifier: Apache-2.0
"""What a router reads on a real server's metrics endpoint, while adapters come and go."""

from __future__ import annotations

import re

import pytest

from multilora_backend.frontend.series import BASE_LABELS, SERIES
from triton_calls import http_post

GREEDY = {"temperature": 0.0, "max_tokens": 32}
DEVICE_BYTES = 1_300_000
"""Room for 4 pages of 8 ranks in the example model: `upper` and one or two others."""


@pytest.fixture(scope="module")
def cramped(launch):
    """A server that can hold few adapters, with two front ends."""
    return launch(instances=2, settings={"adapter_device_bytes": DEVICE_BYTES, "metrics_adapters": 2})


def ask(server, adapter: str = "", **parameters) -> None:
    named = {"lora_name": adapter} if adapter else {}
    status, body = http_post(server.http, "generate", {"text_input": "hello", **GREEDY, **named, **parameters})
    assert status == 200, body


def shown(text: str, name: str) -> list[dict[str, str]]:
    """Labels of the series of a name."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(rf"{re.escape(name)}\{{(.*)\}} \S+", line)
        if match:
            found.append({k: v for k, v in re.findall(r'(\w+)="([^"]*)"', match[1]) if k not in BASE_LABELS})
    return found


def levels(text: str) -> dict[str, str]:
    series = shown(text, "vllm:lora_adapter_loaded")
    assert len({labels["adapter_name"] for labels in series}) == len(series)
    return {labels["adapter_name"]: labels["level"] for labels in series}


def test_routers_see_where_adapters_are(cramped, metrics):
    endpoint = metrics(cramped)
    names = ["upper", "reverse", "rot13", "sort", "double", "devowel"]
    for name in names:
        ask(cramped, name, tenant="acme")
        endpoint.wait("vllm:lora_adapter_loaded", 1.0, adapter_name=name, level="gpu", pinned="false")
        found = levels(endpoint.text())
        assert set(found) == set(names[: names.index(name) + 1]), "each is on the device or still on the host"
    assert set(levels(endpoint.text()).values()) == {"gpu", "cpu"}
    on_device = list(levels(endpoint.text()).values()).count("gpu")
    endpoint.wait("vllm:num_gpu_loaded_lora_adapters", on_device)
    assert endpoint.value("multilora:adapter_evictions_total") == 6 - on_device
    taken, budget = (endpoint.value(f"multilora:adapter_{what}", level="device") for what in ("bytes", "budget_bytes"))
    assert 0 < taken <= budget <= DEVICE_BYTES
    assert on_device <= endpoint.value("vllm:max_gpu_lora_adapters") <= 4

    ask(cramped, "upper", tenant="acme")
    endpoint.wait("multilora:adapter_arrivals_total", 1.0, level="host")
    assert endpoint.value("multilora:adapter_arrivals_total", level="disk") == 6
    endpoint.wait("vllm:lora_adapter_loaded", 1.0, adapter_name="upper", level="gpu")
    endpoint.wait("vllm:lora_adapter_load_seconds_count", 7.0)
    assert endpoint.value("multilora:adapter_wait_seconds_count") == 7


def test_names_from_clients_make_a_bounded_number_of_series(cramped, metrics):
    endpoint = metrics(cramped)
    for name in ("", "upper", "reverse", "rot13", "sort", "double", "devowel") * 2:
        ask(cramped, name, tenant="acme")
    endpoint.settled("multilora:adapter_time_to_first_token_seconds_count")
    text = endpoint.text()
    series = shown(text, "multilora:adapter_time_to_first_token_seconds_count")
    # Two of each front end's own, and all others.
    assert 2 <= len({labels["adapter_name"] for labels in series} - {"__other__"}) <= 4
    assert {"adapter_name": "__other__"} in series
    by_adapter = endpoint.value("multilora:adapter_time_to_first_token_seconds_count")
    assert by_adapter == endpoint.value("vllm:time_to_first_token_seconds_count")
    assert endpoint.value("multilora:tenant_tokens_total", tenant="acme", kind="generation") == endpoint.value(
        "vllm:generation_tokens_total"
    )


def test_the_endpoint_has_the_series_of_the_table_and_no_others(cramped, metrics):
    endpoint = metrics(cramped)
    text = endpoint.text()
    kinds = dict(re.findall(r"# TYPE ((?:vllm|multilora):\w+) (\w+)", text))
    assert kinds.items() <= {name: series.kind for name, series in SERIES.items()}.items()
    # A counter is there once something has been counted.
    assert {name for name in SERIES if name not in kinds} <= {name for name in SERIES if name.endswith("_total")}
    for name in kinds:
        for labels in shown(text, name):
            assert set(labels) == set(SERIES[name].labels), name
    endpoint.wait("vllm:num_requests_running", 0.0)
    [info] = shown(endpoint.text(), "vllm:lora_requests_info")
    assert int(info["max_lora"]) >= 1
    [shape] = shown(text, "vllm:cache_config_info")
    assert shape["block_size"] == "16"
    assert int(shape["num_gpu_blocks"]) > 1000
