# SPDX-License-Identifier: Apache-2.0
"""Each supported family in bf16, base and adapters in one batch, against transformers and peft.

Attention is FlashInfer's where it is installed. Windows and capped scores are kernels of their own there, which take
minutes to compile: they are tested with MULTILORA_SLOW_TESTS=1, and always with the attention in torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_driver
import gpu_models
from gpu_driver import Driver, Mode
from gpu_models import CUDA, DEVICES, FAMILIES, TIMEOUT_S, Judge, check_logits
from multilora_backend.engine import runner
from multilora_backend.models.attention import TorchAttention

pytestmark = pytest.mark.timeout(TIMEOUT_S)

EAGER = Mode("auto", graphs=False)
ADAPTERS = {"r3": {"r": 3}, "r24": {"r": 24}}
WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 19}),
    "gemma2": (
        "gemma2",
        {"attn_logit_softcapping": 3.0, "sliding_window": 19, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 19, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", {"sliding_window": 19}),
}
SLOW = pytest.mark.skipif(
    not os.environ.get("MULTILORA_SLOW_TESTS"), reason="minutes in FlashInfer's compiler: set MULTILORA_SLOW_TESTS=1"
)


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


def check_family(root: Path, device: str, family: str, **settings: Any) -> Driver:
    gpu_models.save_model(root / "model", family, **settings)
    gpu_models.save_adapters(root / "model", root / "adapters", ADAPTERS)
    driver = Driver(root, device, EAGER).preload(ADAPTERS)
    generator = torch.Generator().manual_seed(0)
    for number, length in enumerate((1, 40, 7, 70, 20, 33)):
        prompt = torch.randint(3, 61, (length,), generator=generator).tolist()
        driver.submit(prompt, ["", *ADAPTERS][number % 3], max_tokens=6)
    driver.run()
    assert driver.engine.statistics.adapters_per_step_max == len(ADAPTERS)
    check_logits(driver.requests.values(), Judge(root / "model", root / "adapters", device))
    return driver


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, device: str, family: str):
    check_family(tmp_path, device, family)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_and_capped_scores_in_torch(tmp_path: Path, device: str, name: str, monkeypatch: pytest.MonkeyPatch):
    def in_torch(layers: Any, page_size: int, dtype: torch.dtype, inputs: Any) -> TorchAttention:
        return TorchAttention(page_size, torch.device(device))

    monkeypatch.setattr(runner, "create_attention", in_torch)
    family, settings = WINDOWS[name]
    check_family(tmp_path, device, family, **settings)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=[*CUDA, SLOW])])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 19}),
        ("gemma2", {"attn_logit_softcapping": 3.0}),
    ],
    ids=["window", "capped scores"],
)
def test_windows_and_capped_scores_in_flashinfer(tmp_path: Path, device: str, family: str, settings: dict[str, Any]):
    pytest.importorskip("flashinfer")
    driver = check_family(tmp_path, device, family, **settings)
    assert not isinstance(driver.runner._attention, TorchAttention)
