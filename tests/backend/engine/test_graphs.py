# SPDX-License-Identifier: Apache-2.0
"""Decode steps in graphs of fixed size, without a GPU: which graph serves a step, and that padding changes nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny_models
from gpu_driver import Driver, Mode
from multilora_backend.engine.graphs import DecodeGraph, DecodeGraphs, sizes_up_to, tiers_for, to_capture
from multilora_kernels import ANY_RANKS, FEW_RANKS

ADAPTERS = {
    "small": {"r": 3},
    "attention": {"r": 7, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_alpha": 14},
    "wide": {"r": 40, "lora_alpha": 30},
    "wider": {"r": 130, "lora_alpha": 50},
}
PROMPTS = {"": [5, 6, 7], "small": [9, 8, 7, 6, 5, 4, 3], "attention": [5, 6, 7], "wide": [*range(3, 40)], "wider": [8]}
COUNT = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_all(tmp_path_factory.mktemp("tiny"), ADAPTERS)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    said = {
        name: tiny_models.greedy(folder / "model", folder / "adapters" / name if name else None, prompt, COUNT)
        for name, prompt in PROMPTS.items()
    }
    assert len({tuple(tokens) for tokens in said.values()}) == len(PROMPTS), "or nothing below shows anything"
    return said


def driver_of(folder: Path, strategy: str, **settings) -> Driver:
    return Driver(folder, "cpu", Mode(strategy, graphs=True), dtype="float32", block_size=4, **settings)


def check(driver: Driver, expected: dict[str, list[int]]) -> None:
    driver.run()
    for request in driver.requests.values():
        assert request.token_ids == expected[request.adapter][: len(request.token_ids)]


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlapped"])
@pytest.mark.parametrize("strategy", ["grouped", "bordered"])
def test_padded_steps_say_what_transformers_and_peft_say(folder: Path, expected: dict, strategy: str, overlap: bool):
    driver = driver_of(folder, strategy, overlap=overlap)
    for round_number in range(2):
        for number, (name, prompt) in enumerate([*PROMPTS.items()] * 2):
            # So that the batch shrinks row by row, and that the base is alone at the end.
            driver.submit(prompt, name, max_tokens=COUNT - number % 5 - bool(name))
        check(driver, expected)
        if round_number == 0:
            assert {len(r.token_ids) for r in driver.requests.values()} == {4, 5, 6, 7, 9}
    rows = {(rows, size) for rows, size, _ in driver.replayed}
    tiers = {tier for *_, tier in driver.replayed}
    if strategy == "bordered":
        assert (10, 16) in rows
        assert any(size == rows for rows, size in rows), "and steps that need no padding"
        assert tiers == {0, 64, 256}
    else:
        assert tiers <= {0}, "steps with adapters are in pieces of graph"
    assert any(rows < size for rows, size, _ in driver.prompts_replayed)


def test_base_traffic_is_in_graphs_of_tier_0(folder: Path, expected: dict):
    for strategy in ("grouped", "bordered"):
        driver = driver_of(folder, strategy)
        for _ in range(5):
            driver.submit(PROMPTS[""], max_tokens=COUNT)
        check(driver, expected)
        assert driver.replayed == [(5, 8, 0)] * (COUNT - 1)


@pytest.mark.parametrize(
    "settings",
    [{"max_num_batched_tokens": 5}, {"enable_prefix_caching": True}, {"adapter_device_bytes": 520_000}],
    ids=str,
)
def test_chunks_and_evictions_between_graphs_change_nothing(folder: Path, expected: dict, settings: dict):
    driver = driver_of(folder, "bordered", **settings)
    for name, prompt in [*PROMPTS.items()] * 3:
        driver.submit(prompt, name, max_tokens=COUNT)
    check(driver, expected)
    assert driver.replayed
    if "adapter_device_bytes" in settings:
        assert driver.engine.stats().adapter_evictions_total > 0


def test_few_rows_of_many_ranks_run_in_a_larger_graph(folder: Path, expected: dict):
    driver = driver_of(folder, "bordered").preload(["wider"])
    driver.submit(PROMPTS["wider"], "wider", max_tokens=COUNT)
    check(driver, expected)
    assert set(driver.replayed) == {(1, 4, 256)}, "graphs of 1 and of 2 rows have room for 128 ranks"


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 16, 17, 100, 256])
def test_sizes_pad_by_15_rows_at_most(most: int):
    sizes = sizes_up_to(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        size = min(size for size in sizes if size >= rows)
        assert size - rows <= 15
        assert rows > 8 or size < 2 * rows


def test_sizes_are_few():
    assert sizes_up_to(16) == [1, 2, 4, 8, 16]
    assert len(sizes_up_to(256)) == 20


@pytest.mark.parametrize("rows", [1, 2, 4, 16, 256])
def test_tiers_grow_with_the_rows(rows: int):
    tiers = (64, 128, 256, 512, 1024)
    found = tiers_for(rows, tiers)
    assert found[:3] == [0, 64, 128]
    assert found == [0, *tiers][: len(found)]
    assert set(tiers_for(2 * rows, tiers)) >= set(found)
    # A row of an adapter of rank 64 can always be served by the graph of its own size.
    assert max(found) >= min(64 * rows, 1024)
    assert tiers_for(rows, ()) == [0]


def test_find_takes_the_smallest_graph_of_just_that_tier():
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs._graphs = {
        (tier, rank_block): {size: SimpleNamespace(rows=size, tier=tier, rank_block=rank_block) for size in sizes}
        for tier, rank_block, sizes in (
            (0, ANY_RANKS, (1, 2, 4, 8)),
            (64, ANY_RANKS, (2, 8)),
            (64, FEW_RANKS, (4, 8)),
            (128, ANY_RANKS, (8,)),
        )
    }

    def found(rows: int, tier: int | None, max_rank: int) -> tuple[int, int, int] | None:
        graph = graphs.find(rows, tier, max_rank)
        return None if graph is None else (graph.rows, graph.tier, graph.rank_block)

    assert found(3, 0, 0) == (4, 0, ANY_RANKS)
    assert found(1, 64, 17) == (2, 64, ANY_RANKS)
    assert found(1, 64, 16) == (2, 64, ANY_RANKS), "the kernels that suit it are not worth more rows"
    assert found(3, 64, 16) == (4, 64, FEW_RANKS)
    assert found(5, 64, 16) == (8, 64, FEW_RANKS), "of two that pad alike"
    assert found(9, 64, 16) is None
    assert found(3, 64, 40) == found(8, 64, 40) == (8, 64, ANY_RANKS)
    assert found(1, 128, 9) == (8, 128, ANY_RANKS)
    assert found(9, 0, 0) is None
    assert found(1, 256, 8) is None
    assert found(1, None, 8) is None


@pytest.mark.parametrize("tiers", [(), (64, 128, 256)])
def test_the_largest_graphs_are_captured_first(tiers: tuple[int, ...]):
    of_any, of_few = (to_capture(rank_block, 20, tiers) for rank_block in (ANY_RANKS, FEW_RANKS))
    assert sorted(of_any) == [(rows, tier) for rows in sizes_up_to(20) for tier in tiers_for(rows, tiers)]
    assert of_any == sorted(of_any, reverse=True)
    assert of_few == [(rows, tier) for rows, tier in of_any if tier], "base traffic has no ranks"


def test_adapters_of_few_ranks_are_not_slowed_by_what_larger_ones_need(folder: Path, expected: dict):
    driver = driver_of(folder, "bordered").preload(["attention", "small", "wide"])
    assert driver.runner.decode_graphs is not None
    find, kernels = driver.runner.decode_graphs.find, []

    def found(rows: int, tier: int | None, max_rank: int) -> DecodeGraph | None:
        graph = find(rows, tier, max_rank)
        kernels.append((max_rank, None if graph is None else graph.rank_block))
        return graph

    driver.runner.decode_graphs.find = found  # type: ignore[method-assign]
    for names in (["attention", "small"], ["attention", "wide"]):
        for name in names:
            driver.submit(PROMPTS[name], name, max_tokens=COUNT)
        check(driver, expected)
    assert set(kernels) == {(7, FEW_RANKS), (40, ANY_RANKS)}
