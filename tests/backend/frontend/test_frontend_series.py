# SPDX-License-Identifier: Apache-2.0
"""The tables of series, the values behind them, and who has a series of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_metrics import BASE, FakeTriton
from multilora_backend.adapters.catalogue import RESERVED
from multilora_backend.frontend.labels import BASE_MODEL, OTHER, LabelBudget
from multilora_backend.frontend.meters import Meters
from multilora_backend.frontend.series import BASE_LABELS, SERIES, buckets_for, reference


def test_counters_end_in_total_and_buckets_ascend():
    for name, series in SERIES.items():
        assert (series.kind == "counter") == name.endswith("_total"), name
        assert not set(series.labels) & set(BASE_LABELS)
        buckets = buckets_for(series, 200)
        assert buckets == sorted(set(buckets))
    assert tuple(BASE) == BASE_LABELS
    assert buckets_for(SERIES["vllm:request_prompt_tokens"], 200) == [1, 2, 5, 10, 20, 50, 100, 200]


def test_the_reference_has_a_row_for_each_series():
    _, rule, *rows = reference().splitlines()
    assert [row.split("`")[1] for row in rows] == list(SERIES)
    assert {row.count(" | ") for row in rows} == {rule.count("|") - 2}
    assert "| `multilora:tenant_tokens_total` | counter | `tenant`, `kind` | Tokens" in reference()


def test_no_adapter_can_have_the_names_that_stand_for_others():
    assert {BASE_MODEL, OTHER} <= RESERVED


@given(st.integers(0, 4), st.text("abcdefg"))
def test_the_first_values_have_labels_of_their_own_and_all_others_one(limit: int, values: str):
    budget = LabelBudget(limit)
    first = list(dict.fromkeys(values))[:limit]
    assert [budget.label(value) for value in values] == [value if value in first else OTHER for value in values]


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def meters(triton: FakeTriton) -> Meters:
    return Meters(triton.family(), BASE, 64)


def test_a_replaced_gauge_that_comes_back_is_sent_again(meters, triton):
    name = "vllm:cache_config_info"
    one, two = ((("block_size", size), ("num_gpu_blocks", "7")) for size in ("8", "16"))
    for values in ({one: 3.0}, {two: 4.0}, {one: 3.0, two: 4.0}, {two: 4.0}, {}):
        meters.replace(name, values)
        meters.flush()
        assert {tuple(sorted(labels.items())) for labels in triton.series(name)} == set(values)
    assert triton.messages == 3, "what stays is not sent again"


def test_what_says_something_by_its_labels_is_the_leaders_alone(meters, triton):
    """Two front ends may have the same counter, but one must not free what the other still changes."""
    ends = {name for name, series in SERIES.items() if series.ends}
    assert ends == {"vllm:cache_config_info", "vllm:lora_adapter_loaded", "vllm:lora_requests_info"}
    other = Meters(triton.family(), BASE, 64)
    for each in (meters, other, meters):
        each.add("multilora:handovers_total", 1)
        each.flush()
    assert triton["multilora:handovers_total"] == 3
