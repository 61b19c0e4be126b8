# SPDX-License-Identifier: Apache-2.0
"""DoRA and trained biases in bf16, norms computed where the model lies, in one batch with what has neither."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_driver
import gpu_models
from extras_models import ATTENTION, save_trained
from gpu_driver import Driver, Mode
from gpu_models import DEVICES, TIMEOUT_S, Judge, check_logits

pytestmark = pytest.mark.timeout(TIMEOUT_S)

ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "r": 6},
    "lora-bias": {"lora_bias": True, "r": 20},
    "dora-bias": {"use_dora": True, "bias": "all", "target_modules": ATTENTION},
    "plain": {"r": 3},
}


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "settings"), [("llama", {"attention_bias": True}), ("phi3", {})])
def test_as_near_to_the_truth_as_transformers_and_peft(tmp_path: Path, device: str, family: str, settings: dict):
    gpu_models.save_model(tmp_path / "model", family, **settings)
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        save_trained(tmp_path / "model", tmp_path / "adapters" / name, seed, **fields)
    driver = Driver(tmp_path, device, Mode("auto", graphs=False)).preload(ADAPTERS)
    generator = torch.Generator().manual_seed(0)
    for number, length in enumerate((1, 40, 7, 70, 20, 33, 12)):
        prompt = torch.randint(3, 61, (length,), generator=generator).tolist()
        driver.submit(prompt, ["", *ADAPTERS][number % 5], max_tokens=6)
    driver.run()
    assert driver.engine.statistics.adapters_per_step_max == len(ADAPTERS)
    check_logits(driver.requests.values(), Judge(tmp_path / "model", tmp_path / "adapters", device))
