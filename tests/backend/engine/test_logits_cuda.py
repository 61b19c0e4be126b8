# SPDX-License-Identifier: Apache-2.0
"""Logits of mixed batches in bf16, from prompts through chunks to decodes, against transformers and peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpu_driver
import gpu_models
from gpu_driver import BORDERED_GRAPHS, Driver, Mode
from gpu_models import DEVICES, TIMEOUT_S, Judge, check_logits

pytestmark = pytest.mark.timeout(TIMEOUT_S)

ADAPTERS = {
    "r3": {"r": 3},
    "attention": {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "r16": {"r": 16},
    "r40": {"r": 40, "use_rslora": True, "lora_alpha": 12},
    "r100": {"r": 100, "target_modules": ["v_proj", "up_proj", "down_proj"]},
}
NAMES = ["", *ADAPTERS]
LENGTHS = (1, 7, 37, 90, 20)
MODES = [
    Mode("reference", graphs=False),
    Mode("grouped", graphs=False),
    Mode("grouped", graphs=True),
    Mode("bordered", graphs=False),
    BORDERED_GRAPHS,
]


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("head_dim_64"), head_dim=64)


def saved(root: Path, **settings: int) -> Path:
    gpu_models.save_model(root / "model", **settings)
    gpu_models.save_adapters(root / "model", root / "adapters", ADAPTERS)
    return root


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def judge(folder: Path, device: str) -> Judge:
    return Judge(folder / "model", folder / "adapters", device)


def submit_all(driver: Driver, names: list[str] = NAMES) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(15):
        prompt = torch.randint(3, 61, (LENGTHS[number % 5],), generator=generator).tolist()
        driver.submit(prompt, names[number % len(names)], max_tokens=4 + number % 9)


def check_coverage(driver: Driver, mode: Mode) -> None:
    """The requests met each way to compute a step that the mode has."""
    assert driver.engine.statistics.adapters_per_step_max == len(ADAPTERS)
    if mode.graphs:
        tiers = {tier for *_, tier in driver.replayed}
        assert tiers & {64, 128, 256} if mode.strategy == "bordered" else tiers <= {0}


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_mixed_ranks_are_as_near_to_the_truth_as_transformers(folder: Path, judge: Judge, device: str, mode: Mode):
    driver = Driver(folder, device, mode).preload(NAMES)
    submit_all(driver)
    driver.run()
    check_coverage(driver, mode)
    check_logits(driver.requests.values(), judge)
    if mode.graphs:
        submit_all(driver.clear(), [name for name in NAMES if name != "r100"])
        driver.run()
        assert driver.prompts_replayed, "which take ranks up to 64"
        check_logits(driver.requests.values(), judge)
        for names in (["", ""], ["r40", "r3"]):
            driver.clear().submit([5, 6, 7], names[0])
            driver.submit([8] * 21, names[1])
            driver.run()
            assert driver.prompts_replayed[0] == (24, 64, 2)
            check_logits(driver.requests.values(), judge)
            if not any(names):
                assert {tier for *_, tier in driver.replayed} == {0}, "although adapters are resident"


def test_prompts_in_small_chunks(folder: Path, judge: Judge, device: str):
    driver = Driver(folder, device, max_num_batched_tokens=24).preload(NAMES)
    submit_all(driver)
    driver.run()
    check_logits(driver.requests.values(), judge)


def test_cached_beginnings_and_preemption(folder: Path, judge: Judge, device: str):
    driver = Driver(folder, device, enable_prefix_caching=True, kv_cache_bytes=20 * 16 * 1024).preload(NAMES)
    for _ in range(2):
        submit_all(driver)
    driver.run()
    assert driver.engine.scheduler.preemptions
    assert driver.engine.pages.hits
    check_logits(driver.requests.values(), judge)


def test_head_dim_128(tmp_path: Path, device: str):
    root = saved(tmp_path, head_dim=128, num_attention_heads=2, num_key_value_heads=1)
    driver = Driver(root, device).preload(NAMES)
    submit_all(driver)
    driver.run()
    check_coverage(driver, BORDERED_GRAPHS)
    check_logits(driver.requests.values(), Judge(root / "model", root / "adapters", device))
