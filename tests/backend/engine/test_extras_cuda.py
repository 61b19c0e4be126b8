# SPDX-License-Identifier: Apache-2.0
"""All kinds of extras in bf16, DoRA's norms computed where the model lies, in one batch with what has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpu_driver
import gpu_models
from extras_models import EXTRAS, ResizingJudge, save_trained
from gpu_driver import Driver, Mode
from gpu_models import DEVICES, TIMEOUT_S, check_logits

pytestmark = pytest.mark.timeout(TIMEOUT_S)


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("family", "settings", "group"),
    [
        ("llama", {"attention_bias": True}, "affine"),
        ("phi3", {}, "affine"),
        ("llama", {}, "tables"),
        ("qwen3", {}, "tables"),
        ("gemma2", {"tie_word_embeddings": False}, "tables"),
        ("llama", {}, "added"),
    ],
)
def test_as_near_to_the_truth_as_transformers_and_peft(
    tmp_path: Path, device: str, family: str, settings: dict, group: str
):
    adapters = EXTRAS[group]
    gpu_models.save_model(tmp_path / "model", family, **settings)
    for seed, (name, fields) in enumerate(adapters.items()):
        save_trained(tmp_path / "model", tmp_path / "adapters" / name, seed, **fields)
    driver = Driver(tmp_path, device, Mode("auto", graphs=False), adapter_extras_bytes=2**20).preload(adapters)
    generator = torch.Generator().manual_seed(0)
    for number, length in enumerate((1, 40, 7, 70, 20, 33, 12)):
        prompt = torch.randint(3, 60, (length,), generator=generator).tolist()
        driver.submit(prompt, ["", *adapters][number % 5], max_tokens=6)
    driver.run()
    assert driver.engine.statistics.adapters_per_step_max == len(adapters)
    judge = ResizingJudge(tmp_path / "model", tmp_path / "adapters", device)
    for request in driver.requests.values():
        known = judge.logits(request.adapter, request.prompt).shape[1]
        for number, row in request.rows.items():
            assert (row[known:] == -torch.inf).all()
            request.rows[number] = row[:known]
    check_logits(driver.requests.values(), judge)
