# SPDX-License-Identifier: Apache-2.0
"""`multilora plan` against an engine that is started on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
from multilora_backend.config import Config
from multilora_backend.engine.engine import Engine
from multilora_backend.planning.plan import CUDA_CONTEXT_BYTES, Machine, machine_of, make_plan

MOST_IN_USE = 2 * 2**30
"""A CUDA context, and what this process has used before."""
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_plan_is_what_a_start_allocates(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
    # Weights so small that eight layers of this width do not make noise of the order of sums.
    tiny_models.save_llama(tmp_path / "model", **shape, num_hidden_layers=8, head_dim=64, initializer_range=0.02)
    tiny_models.save_adapter(tmp_path / "model", tmp_path / "adapters" / "a", 0, r=12)
    folders = {"model": str(tmp_path / "model"), "adapters": str(tmp_path / "adapters")}
    config = Config(**folders, enforce_eager=True, max_num_batched_tokens=64, max_num_seqs=8)
    plan = make_plan(config, machine_of(config))
    free, total = torch.cuda.mem_get_info()
    if total - free > MOST_IN_USE:
        pytest.skip(f"others hold {total - free:,} bytes of the device, more or less of it from one moment to the next")
    stated = make_plan(config, Machine(torch.device("cuda"), total, total - CUDA_CONTEXT_BYTES))
    engine = Engine(config, wake=lambda: None)
    try:
        pages, pool = engine.pages.num_pages - 1, engine.adapters.pool
        print(f"KV pages: {pages} started, {plan.kv_pages} planned here, {stated.kv_pages} for a stated size")
        module = engine.model.module
        assert plan.weights + plan.border == sum(t.nbytes for t in {*module.parameters(), *module.buffers()})
        assert plan.ranks == pool.num_ranks
        # cuBLAS's workspace, and torch's rounding of allocations to 2 MiB.
        assert abs(plan.kv_pages - pages) <= 0.01 * pages
        assert abs(stated.kv_pages - pages) <= 0.02 * pages
    finally:
        engine.close()
