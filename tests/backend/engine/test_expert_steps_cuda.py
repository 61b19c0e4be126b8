# SPDX-License-Identifier: Apache-2.0
"""Steps of mixtures of experts: in graphs unless an adapter acts on experts, right either way, and never waiting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_driver
import gpu_models
from gpu_driver import Driver
from gpu_models import CUDA, DEVICES, TIMEOUT_S, WITH_EXPERTS, Judge, check_logits
from multilora_backend.adapters.ranks import padded
from multilora_backend.models import moe
from multilora_backend.models.lora import Grouped

pytestmark = pytest.mark.timeout(TIMEOUT_S)

FAMILY = "qwen3_moe"
ON_EXPERTS = ("experts", "everything")
TIE = 0.1
"""Of these prompts' rows some have a third and a fourth expert that are 0.007 apart, where bf16 is 0.05 off."""


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    gpu_models.save_model(root / "model", FAMILY)
    gpu_models.save_adapters(root / "model", root / "adapters", WITH_EXPERTS)
    return root


def submit(driver: Driver, names: list[str], count: int = 9) -> Driver:
    driver.clear()
    for number in range(count):
        prompt = [3 + (7 * number + 5 * i * i) % 58 for i in range(2 + 9 * number % 30)]
        driver.submit(prompt, names[number % len(names)], max_tokens=4 + number % 3)
    return driver.run()


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_hold_all_but_adapters_on_experts(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch):
    driver = Driver(folder, device, adapter_device_bytes=2**24).preload(WITH_EXPERTS)
    judge = Judge(folder / "model", folder / "adapters", device)
    sites: list[int] = []
    add = Grouped.add_on_experts

    def count(self: Grouped, site: int, *rest: Any) -> None:
        sites.append(site)
        add(self, site, *rest)

    monkeypatch.setattr(Grouped, "add_on_experts", count)
    submit(driver, ["", "attention", "router"])
    check_logits(driver.requests.values(), judge, TIE)
    assert driver.replayed
    assert driver.prompts_replayed
    assert not sites, "nothing is launched for experts that no adapter acts on"

    submit(driver, ["", *WITH_EXPERTS])
    check_logits(driver.requests.values(), judge, TIE)
    expert_sites = {i for i, site in enumerate(driver.engine.model.sites) if site.experts}
    assert len(expert_sites) == 4
    assert set(sites) == expert_sites
    submit(driver, list(ON_EXPERTS))
    assert not driver.replayed
    assert not driver.prompts_replayed


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_one_adapter_stays_in_its_rows(folder: Path, device: str):
    driver = Driver(folder, device, adapter_device_bytes=2**24).preload(WITH_EXPERTS)
    lease = driver.engine.adapters.lease("everything")
    pool = driver.engine.adapters.pool
    start, stop = lease.rank_start, lease.rank_start + padded(lease.rank)
    for tensor in [*pool.a, *pool.b]:
        per_rank = len(tensor) // pool.num_ranks
        tensor[start * per_rank : stop * per_rank] = torch.nan
    driver.engine.adapters.release(lease)
    submit(driver, ["", *WITH_EXPERTS], count=10)
    own = [request for request in driver.requests.values() if request.adapter == "everything"]
    assert all(request.logits.isnan().all() for request in own)
    others = [request for request in driver.requests.values() if request.adapter != "everything"]
    check_logits(others, Judge(folder / "model", folder / "adapters", device), TIE)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_a_step_on_experts_never_asks_the_device(folder: Path, device: str):
    driver = Driver(folder, device, adapter_device_bytes=2**24).preload(WITH_EXPERTS)
    submit(driver, ["", *WITH_EXPERTS])
    before = torch.cuda.get_sync_debug_mode()
    launch = driver.runner.launch

    def guarded(plan: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    for slots in (1, 5):
        for number in range(slots):
            driver.submit([3, 4, 5 + number], "everything", max_tokens=8)
        for _ in range(3):  # prompts; FlashInfer's plan for them may ask
            driver.step()
        driver.runner.launch = guarded  # type: ignore[method-assign]
        driver.run()
        driver.runner.launch = launch  # type: ignore[method-assign]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_the_grouped_gemm_is_the_loops(device: str):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 48, 64, generator=generator).to(device, torch.bfloat16)
    assert moe.has_grouped_gemm(weight)
    for ends in ([0, 5, 5, 9, 30, 30], [1] * 6, [0, 0, 0, 0, 0, 7]):
        x = torch.randn(ends[-1], 64, generator=generator).to(device, torch.bfloat16)
        on_device = torch.tensor(ends, dtype=torch.int32, device=device)
        ours = moe.grouped_linear(x, weight, on_device).float()
        loops = moe.grouped_linear_reference(x, weight, on_device).float()
        # Two roundings of sums that differ by float32's.
        assert (ours - loops).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * loops.abs().max()
