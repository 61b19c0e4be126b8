# SPDX-License-Identifier: Apache-2.0
"""The tiny model of `engine_bench`, what it says, and the ways to compute it."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from engine_bench import ADAPTERS, PROMPTS, Driver

MODES = [
    {"lora_strategy": "grouped", "async_scheduling": "false"},
    {"lora_strategy": "reference", "async_scheduling": "true"},
    {"lora_strategy": "bordered", "async_scheduling": "true"},
]


@pytest.fixture(params=MODES, ids=lambda mode: "-".join(mode.values()))
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds whatever computes LoRA, and with a step launched before the last one's results are read."""
    monkeypatch.setattr(Driver, "MODE", request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_all(tmp_path_factory.mktemp("tiny"), ADAPTERS)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    return {
        name: tiny_models.greedy(folder / "model", folder / "adapters" / name if name else None, prompt, 9)
        for name, prompt in PROMPTS.items()
    }
