# SPDX-License-Identifier: Apache-2.0
"""KV pages that move to host memory and back: every bit, and the tokens of a request that lost its place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import tiny_models
from gpu_models import DEVICES
from multilora_backend.config import Config
from multilora_backend.core import PageMove, SamplingParams
from multilora_backend.engine import host_pages
from multilora_backend.engine.engine import Engine
from multilora_backend.engine.host_pages import HostPageStore
from multilora_backend.errors import MultiloraError
from multilora_backend.protocol import Outputs, Submit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_come_back_bit_for_bit(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Layers of unequal shape, more pages than are gathered at a time, places that are used again in one go."""
    monkeypatch.setattr(host_pages, "CHUNK", 3)
    caches = [torch.randn(20, 2, 4, heads, dim, dtype=dtype, device=device) for heads, dim in ((2, 8), (1, 16), (3, 8))]
    store = HostPageStore(caches, 8)
    pages, to = (1, 19, 4, 7, 2), (11, 12, 3, 9, 15)
    before = [cache.clone() for cache in caches]
    out = PageMove(pages, (7, 0, 3, 5, 1), to_host=True)
    back = PageMove(to, out.places, to_host=False)
    reused = PageMove((16, 17), (3, 0), to_host=True)
    store.move([out])
    for cache in caches:
        cache[list(pages)] = torch.nan
    store.move([back, reused, PageMove((13, 14), (3, 0), to_host=False)])
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[list(to)], old[list(pages)])
        assert torch.equal(cache[[13, 14]], old[[16, 17]])
        untouched = sorted(set(range(20)) - {*pages, *to, 13, 14})
        assert torch.equal(cache[untouched], old[untouched])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_models.save_llama(root / "model")
    for seed, name in enumerate("ab"):
        tiny_models.save_adapter(root / "model", root / "adapters" / name, seed, r=8)
    return root


@pytest.mark.parametrize("overlap", ["false", "true"])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("turns", [False, True])
def test_what_was_moved_says_what_it_would_have_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overlap: str, caching: bool, turns: bool
):
    monkeypatch.setattr("multilora_backend.scheduling.host.OVERHEAD_S", 0.0)
    page_bytes = 4 * 2 * 2 * 2 * 8 * 4  # 4 tokens, 2 layers, K and V, 2 heads of 8, fp32
    settings = {"max_loras": 1, "tenure_s": 1e-6, "max_overtake_s": 0.0} if turns else {}
    places = {"model": str(folder / "model"), "adapters": str(folder / "adapters"), "device": "cpu"}
    config = Config(
        **places,
        **settings,
        block_size=4,
        kv_cache_bytes=24 * page_bytes,
        kv_host_bytes=12 * page_bytes,
        enable_prefix_caching=caching,
        async_scheduling=overlap,
        adapters_watch_s=0.0,
    )
    engine = Engine(config, wake=lambda: None)
    prompts = {i: [3 + (7 * i + j) % 50 for j in range(4 + 3 * i)] for i in range(9)}
    tokens: dict[int, list[int]] = {i: [] for i in prompts}
    for i, prompt in prompts.items():
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        engine.submit("front", Submit(i, prompt, sampling, ("", "a", "b")[i % 3]))
    deadline = time.monotonic() + 60
    while not engine.idle:
        assert time.monotonic() < deadline
        engine.step()
        for message in engine.take_replies().get("front", []):
            assert isinstance(message, Outputs)
            for item in message.items:
                tokens[item.request_id] += item.token_ids
    engine.check_idle()
    engine.close()
    assert engine.scheduler.host.moved > 0
    for i, prompt in prompts.items():
        adapter = folder / "adapters" / "ab"[i % 3 - 1] if i % 3 else None
        assert tokens[i] == tiny_models.greedy(folder / "model", adapter, prompt, 12)


def test_bytes_are_checked():
    with pytest.raises(MultiloraError, match="kv_host_bytes: must be 0 or more, got -1"):
        Config(kv_host_bytes=-1)
