# SPDX-License-Identifier: Apache-2.0
"""An adapter that was never trained serves, and whoever asks is told: the log, `show`, `list` and `load`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from multilora_backend.config import Config
from multilora_backend.engine.engine import Engine
from multilora_backend.protocol import AdapterArguments, AdapterCommand, AdapterReply


def test_an_adapter_without_effect_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tiny_models.save_llama(tmp_path / "model")
    for seed, name in enumerate(("flat", "tuned")):
        folder = tiny_models.save_adapter(tmp_path / "model", tmp_path / "adapters" / name, seed)
        path = folder / "adapter_model.safetensors"
        if name == "flat":
            tensors = load_file(path)
            save_file({key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tensors.items()}, path)
    places = {"model": str(tmp_path / "model"), "adapters": str(tmp_path / "adapters")}
    engine = Engine(Config(**places, device="cpu", adapters_watch_s=0.0), wake=lambda: None)

    def answer(action: str, **arguments: Any) -> dict[str, Any]:
        engine.command("admin", AdapterCommand(1, action, AdapterArguments(**arguments)))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            engine.step()
            for message in engine.take_replies().get("admin", []):
                assert isinstance(message, AdapterReply), message
                return message.result
            time.sleep(0.002)
        raise AssertionError("no answer")

    with caplog.at_level(logging.WARNING):
        loaded = {name: answer("load", name=name)["adapter"] for name in ("flat", "tuned")}
    assert {name: info["no_effect"] for name, info in loaded.items()} == {"flat": True, "tuned": False}
    assert answer("show", name="flat")["adapter"]["no_effect"]
    assert {info["name"] for info in answer("list")["adapters"] if info["no_effect"]} == {"flat"}
    assert [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()] == [
        "adapter flat: has no effect, all its deltas are zero"
    ]
    engine.close()
