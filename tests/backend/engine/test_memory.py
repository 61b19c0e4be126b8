# SPDX-License-Identifier: Apache-2.0
"""What is pinned at start for adapters, and what a collection of garbage goes through afterwards."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.config import Config
from multilora_backend.engine import adapters, server
from multilora_backend.engine.adapters import TRANSFERS, pinned_bytes
from multilora_backend.engine.memory import freeze_heap


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("small", 300), ("large", 1000), ("broken", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        if size is not None:
            (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(size))
    return tmp_path


@pytest.mark.parametrize(("host", "kept"), [(10**9, 1300), (700, 700), (0, 0)])
def test_pinned_is_what_the_files_need_within_the_budget(folder: Path, host: int, kept: int) -> None:
    config = Config(model="m", adapters=str(folder), adapter_host_bytes=host, adapter_load_threads=3)
    assert pinned_bytes(config, Catalogue.read(folder).entries) == kept + (6 + TRANSFERS) * 1000


def test_loads_of_very_large_adapters_are_pinned_when_they_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MAX_LOADING_BYTES", 1500)
    config = Config(model="m", adapters=str(folder), adapter_host_bytes=0)
    assert pinned_bytes(config, Catalogue.read(folder).entries) == 1500
    assert pinned_bytes(config, ()) == 0


def test_a_frozen_heap_is_not_looked_at() -> None:
    heap = [[] for _ in range(50_000)]
    try:
        freeze_heap()
        assert gc.get_freeze_count() >= len(heap)
        assert len(gc.get_objects()) < len(heap)
    finally:
        gc.unfreeze()


class Stopped(Exception):
    """Nothing beyond this point is wanted: the rest needs a device, or a front end."""


def stop(*_: object) -> None:
    raise Stopped


def test_memory_is_pinned_before_the_manager_has_any_and_on_cuda_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(adapters.layout, "reserve", asked.append)
    monkeypatch.setattr(adapters, "AdapterManager", lambda *_, **__: stop())
    monkeypatch.setattr(adapters.memory, "extras_bytes", lambda *_: 0)
    sizes = {"adapter_device_bytes": 10**6, "adapter_extras_bytes": 10**5, "adapter_host_bytes": 700}
    config = Config(model="m", adapters=str(folder), adapter_load_threads=3, **sizes)
    for device in ("cpu", "cuda"):
        model = SimpleNamespace(device=torch.device(device), sites=[], dtype=torch.float32, module=None)
        monkeypatch.setattr(adapters, "base_model", lambda *_: None)
        with pytest.raises(Stopped):
            adapters.create_adapters(config, model, lambda: None)  # type: ignore[arg-type]  # of a model it needs this
    assert asked == [700 + (6 + TRANSFERS) * 1000]


def test_the_server_freezes_the_heap_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.memory, "freeze_heap", stop)
    with pytest.raises(Stopped):
        object.__new__(server.EngineServer).run()
