# SPDX-License-Identifier: Apache-2.0
"""Steps in graphs: bit for bit what the same kernels give eagerly, the same twice, alike whoever spoils a neighbour,
and launched without the host ever waiting for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_driver
import gpu_models
from gpu_driver import Driver, Mode, run_eagerly
from gpu_models import DEVICES, MIXED_RANKS, TIMEOUT_S
from multilora_backend.adapters.ranks import padded
from multilora_backend.core import StepPlan
from multilora_backend.engine.graphs import DecodeGraph
from multilora_backend.engine.prompt_graphs import PromptGraph
from multilora_backend.models.attention import AttentionBackend
from multilora_backend.models.bordered import Bordered

pytestmark = pytest.mark.timeout(TIMEOUT_S)

NAMES = ["", *MIXED_RANKS]


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("steps")
    gpu_models.save_model(root / "model")
    gpu_models.save_adapters(root / "model", root / "adapters", MIXED_RANKS)
    return root


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def prompt_of(number: int) -> list[int]:
    return [3 + (7 * number + 5 * i * i) % 58 for i in range(1 + 11 * number % 40)]


def play(driver: Driver, names: list[str], count: int = 14, wave: int = 3, **sampling: Any) -> Driver:
    """Requests that arrive in waves, the same each time."""
    driver.clear()
    for number in range(count):
        more = {name: value(number) if callable(value) else value for name, value in sampling.items()}
        driver.submit(prompt_of(number), names[number % len(names)], **{"max_tokens": 6 + number % 5, **more})
        if number % wave == wave - 1:
            driver.step()
    return driver.run()


def recorded(driver: Driver) -> tuple[list, dict, list]:
    """Tokens by request, logits by request and token, and who shared the steps."""
    requests = driver.requests
    logits = {(number, i): row.cpu() for number, request in requests.items() for i, row in request.rows.items()}
    assert driver.batches
    return [request.token_ids for request in requests.values()], logits, driver.batches


def assert_equal_bits(first: dict[Any, torch.Tensor], second: dict[Any, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, row in first.items():
        assert torch.equal(row, second[key]), f"request and token {key}"


def test_decode_graphs_give_the_bits_of_their_kernels_run_eagerly(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
):
    driver = Driver(folder, device).preload(NAMES)
    replay, pairs = DecodeGraph.replay, []

    def replay_and_run_eagerly(graph: DecodeGraph) -> None:
        replay(graph)
        rows, captured = driver.replayed[-1][0], graph.logits.clone()
        pairs.append((driver.replayed[-1], captured[:rows], run_eagerly(driver.runner, graph)[:rows]))

    monkeypatch.setattr(DecodeGraph, "replay", replay_and_run_eagerly)
    for names in ([""], ["r3", "attention", ""], ["r40", "", "r16"], ["r100", ""], NAMES[::-1]):
        for rows in (1, 2, 3, 5, 8, 11, 16):
            for number in range(rows):
                driver.submit(prompt_of(number)[:4], names[number % len(names)], max_tokens=4)
            driver.run()
    assert {size for (_, size, _), *_ in pairs} == {1, 2, 4, 8, 16}
    assert {tier for (*_, tier), *_ in pairs} == {0, 64, 128, 256}
    assert sum(rows < size for (rows, size, _), *_ in pairs) > 20
    for what, captured, eager in pairs:
        assert captured.isfinite().all()
        assert torch.equal(captured, eager), f"rows, rows of the graph, tier: {what}"


@pytest.mark.parametrize("strategy", ["grouped", "bordered"])
def test_prompt_graphs_give_the_bits_of_their_kernels_run_eagerly(
    folder: Path, device: str, strategy: str, monkeypatch: pytest.MonkeyPatch
):
    driver = Driver(folder, device, Mode(strategy, graphs=True), max_num_batched_tokens=200).preload(NAMES)
    replay, pairs = PromptGraph.replay, []

    def replay_and_run_eagerly(graph: PromptGraph, attention: AttentionBackend) -> None:
        replay(graph, attention)
        samples, captured = driver.prompts_replayed[-1][2], graph.logits.clone()
        eager = run_eagerly(driver.runner, graph)
        pairs.append((driver.prompts_replayed[-1], (graph.tier, graph.ranks), captured[:samples], eager[:samples]))

    monkeypatch.setattr(PromptGraph, "replay", replay_and_run_eagerly)
    for names in ([""], ["r3", "attention", "r16", ""], ["r40", "", "r3"], ["r40", "r16", "r3", "attention"]):
        for rows in (3, 30, 64, 90, 140, 193, 200):
            count = max(3, len(set(names) - {""}))
            for number in range(count):
                prompt = [3 + (number + i * i) % 58 for i in range(max(1, (rows + number) // count))]
                driver.submit(prompt, names[number % len(names)], max_tokens=3)
            driver.run()
    assert {size for (_, size, _), *_ in pairs} == {64, 128, 192, 200}
    # Up to 64 ranks together lie in the border; the last names have 72.
    expected = {(0, 0), (64, 16), (64, 64), (0, 64)} if strategy == "bordered" else {(0, 0), (0, 16), (0, 64)}
    assert {kind for _, kind, *_ in pairs} == expected
    for what, kind, captured, eager in pairs:
        assert captured.isfinite().all()
        assert torch.equal(captured, eager), f"rows, rows of the graph, samples: {what}; tier, ranks: {kind}"


def test_nan_in_one_adapter_changes_no_bit_of_the_others(folder: Path, device: str):
    # Few pages, so that those which have held NaN are soon another's.
    driver = Driver(folder, device, kv_cache_bytes=64 * 16 * 1024).preload(NAMES)
    lora, pool = driver.runner._lora, driver.engine.adapters.pool
    assert isinstance(lora, Bordered)
    _, healthy, batches = recorded(play(driver, NAMES))
    lease = driver.engine.adapters.lease("r16")
    start, stop = lease.rank_start, lease.rank_start + padded(lease.rank)
    for a, b in zip(pool.a, pool.b, strict=True):
        slices = len(a) // pool.num_ranks
        a[start * slices : stop * slices] = torch.nan
        b[start:stop] = torch.nan
    lora._border.forget((lease.slot, lease.generation))  # what lies there is copied from the pool again
    driver.engine.adapters.release(lease)
    for _ in range(2):
        _, spoilt, batches_now = recorded(play(driver, NAMES))
        assert driver.replayed
        assert batches_now == batches, "or bits may differ for good reasons"
        own = {key for key in spoilt if driver.requests[key[0]].adapter == "r16"}
        assert all(spoilt[key].isnan().any() for key in own)
        others = spoilt.keys() - own
        assert_equal_bits({key: healthy[key] for key in others}, {key: spoilt[key] for key in others})


@pytest.mark.parametrize("mode", [Mode("bordered", graphs=True), Mode("grouped", graphs=False)], ids=str)
def test_the_same_traffic_gives_the_same_bits(folder: Path, device: str, mode: Mode):
    sampling = {
        "temperature": lambda number: (0.0, 1.0, 1.5)[number % 3],
        "seed": lambda number: number,
        "top_p": lambda number: (1.0, 0.8)[number % 2],
        "frequency_penalty": lambda number: (0.0, 0.7)[number % 5 == 4],
        "logprobs": lambda number: (None, 2)[number % 7 == 6],
    }
    runs = []
    for _ in range(2):
        driver = Driver(folder, device, mode).preload(NAMES)
        runs += [recorded(play(driver, NAMES, **sampling)) for _ in range(2)]
    tokens, logits, batches = runs[0]
    assert len({tuple(said) for said in tokens}) > 10
    for other_tokens, other_logits, other_batches in runs[1:]:
        assert other_batches == batches
        assert_equal_bits(logits, other_logits)
        assert other_tokens == tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_overlapped_steps_give_the_same_tokens(folder: Path, device: str, temperature: float):
    runs = []
    for overlap in (False, True):
        driver = Driver(folder, device, overlap=overlap).preload(NAMES)
        runs.append(recorded(play(driver, NAMES, wave=99, temperature=temperature, seed=5, repetition_penalty=1.2)))
    (tokens, logits, batches), (other_tokens, other_logits, other_batches) = runs
    assert other_batches == batches, "the same steps are planned without knowing their tokens"
    assert_equal_bits(logits, other_logits)
    assert other_tokens == tokens


@contextmanager
def syncs_are_errors(device: str) -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    if device == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_decode_step_is_launched_without_a_sync(folder: Path, device: str):
    driver = Driver(folder, device).preload(NAMES)
    launch, guarded = driver.runner.launch, []

    def launch_guarded(plan: StepPlan) -> Any:
        if any(slot.count > 1 for slot in plan.slots):
            return launch(plan)
        with syncs_are_errors(device):
            launched = launch(plan)
        guarded.append(len(plan.slots))
        return launched

    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0.0, "logprobs": 3, "min_tokens": 2, "logit_bias": {5: -3.0}},
    ]

    def traffic() -> None:
        play(driver, NAMES, count=16, wave=99)
        for number in range(16):  # each sequence ends at a time of its own: adapters leave the batch, and so the border
            driver.submit(
                prompt_of(number)[:4], NAMES[(15 - number) % 6], **{**kinds[number % 4], "max_tokens": 3 + number}
            )
        driver.run()

    traffic()
    driver.runner.launch = launch_guarded  # type: ignore[method-assign]
    traffic()
    assert not driver.failed
    assert len(guarded) > 20
    assert {1, 16} <= set(guarded)
    assert {tier for *_, tier in driver.replayed} >= {0, 64, 128}
