# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from multilora_backend.adapters import layout
from multilora_backend.adapters.peft import read_adapter
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.errors import MultiloraError


def bytes_per_rank(sites, itemsize=4):
    return itemsize * sum(len(site.modules) * site.in_features + site.width for site in sites)


def test_budget_becomes_whole_pages(sites):
    per_rank = bytes_per_rank(sites)
    pool = DevicePool(sites, 24 * per_rank - 1, torch.float32, "cpu")
    assert (pool.bytes_per_rank, pool.num_ranks, pool.num_slots) == (per_rank, 16, 2)
    assert sum(t.nbytes for t in [*pool.a, *pool.b]) == 16 * per_rank
    assert [tuple(a.shape) for a in pool.a[:4]] == [(48, 32), (16, 32), (32, 32), (16, 40)]
    assert [tuple(b.shape) for b in pool.b[:4]] == [(16, 64), (16, 32), (16, 80), (16, 32)]
    assert not any(t.any() for t in [*pool.a, *pool.b])
    assert DevicePool(sites, 24 * per_rank, torch.bfloat16, "cpu").num_ranks == 48
    assert DevicePool(sites, 2**40, torch.float32, "cpu", max_ranks=100).num_ranks == 96


def test_budget_below_one_page(sites):
    with pytest.raises(MultiloraError, match=f"^adapter_device_bytes: must be at least {8 * bytes_per_rank(sites)}"):
        DevicePool(sites, 8 * bytes_per_rank(sites) - 1, torch.float32, "cpu")


def test_what_can_never_fit_says_what_would(sites):
    pool = DevicePool(sites, 16 * bytes_per_rank(sites), torch.float32, "cpu")
    assert pool.too_large(16) == ""
    assert pool.too_large(17).startswith(f"rank 17 needs adapter_device_bytes of {24 * bytes_per_rank(sites)}")


# Every block in a buffer of its own, some blocks together, everything in one; with and without room to stage them.
@pytest.mark.parametrize(("buffer_bytes", "staging"), [(1, 0), (1, 10**4), (6000, 1500), (6000, 1000), (10**6, 10**5)])
def test_write_leaves_nothing_of_earlier_owners_and_nobody_elses(save, sites, monkeypatch, buffer_bytes, staging):
    monkeypatch.setattr(layout, "BUFFER_BYTES", buffer_bytes)
    folder = save(r=11, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 2})
    weights = read_adapter(folder, sites, torch.float32)
    stored = load_file(folder / "adapter_model.safetensors")
    pool = DevicePool(sites, 40 * bytes_per_rank(sites), torch.float32, "cpu")
    pool._staging = torch.full((staging,), torch.nan)
    for tensor in [*pool.a, *pool.b]:
        tensor.fill_(float("nan"))
    assert pool.write(weights, slot=3, rank_start=8).done()
    assert (pool.rank_start[3], pool.rank[3]) == (8, 11)
    assert pool.rank.sum() == 11
    for site, a, b in zip(sites, pool.a, pool.b, strict=True):
        slices = len(site.modules)
        for outside in (a[: 8 * slices], a[24 * slices :], b[:8], b[24:]):
            assert outside.isnan().all()
        for i, (module, columns) in enumerate(zip(site.modules, b.split(site.out_features, dim=1), strict=True)):
            lora = f"base_model.model.{module}.lora_"
            expected_a, expected_b = torch.zeros(16, site.in_features), torch.zeros(16, site.out_features[i])
            if lora + "A.weight" in stored:
                rank = len(stored[lora + "A.weight"])
                expected_a[:rank] = stored[lora + "A.weight"]
                expected_b[:rank] = stored[lora + "B.weight"].T * (6 / rank)
            assert torch.equal(a[8 * slices + i * 16 :][:16], expected_a)
            assert torch.equal(columns[8:24], expected_b)
    pool.clear(3)
    assert not pool.rank.any()


def test_generations_differ_even_in_one_slot_and_for_one_adapter(save, sites):
    weights = read_adapter(save(), sites, torch.float32)
    pool = DevicePool(sites, 40 * bytes_per_rank(sites), torch.float32, "cpu")
    seen = set()
    for slot in (0, 1, 0, 0):
        pool.write(weights, slot, rank_start=8 * slot)
        seen.add(int(pool.generation[slot]))
    assert len(seen) == 4


def test_buffers_are_cut_between_tensors_and_hold_them_in_order(sites, monkeypatch):
    monkeypatch.setattr(layout, "BUFFER_BYTES", 4000)
    buffers, views = layout.allocate(sites, {0, 3, 6}, 5, torch.float32)
    assert [view is None for view in views] == [i not in (0, 3, 6) for i in range(len(sites))]
    for value, tensor in enumerate(t for view in views if view for t in (view.a, view.b)):
        tensor.fill_(value)
    content = torch.cat([buffer.data for buffer in buffers])
    assert (content.diff() >= 0).all()
    assert len(content) * 4 == sum(buffer.nbytes for buffer in buffers) == 8 * (3 * 32 + 64 + 40 + 32 + 64 + 80) * 4
    assert all(sum(buffer.sizes) == len(buffer.data) for buffer in buffers)
    # 8 ranks of 4 bytes, a and b in turn: q/k/v exceeds 4000 bytes with its b, and so on.
    assert [buffer.nbytes // 32 for buffer in buffers] == [3 * 32, 64 + 40, 32 + 64, 80]


@pytest.mark.parametrize("to", [0, 8, 16, 24, 32, 40])
def test_move_takes_an_adapter_along_whole_and_nobody_else(save, sites, to):
    weights = read_adapter(save(r=20), sites, torch.float32)
    pool = DevicePool(sites, 64 * bytes_per_rank(sites), torch.float32, "cpu")
    for tensor in [*pool.a, *pool.b]:
        tensor.fill_(float("nan"))
    pool.write(weights, slot=2, rank_start=24)
    generation, before = int(pool.generation[2]), [[t.clone() for t in pair] for pair in pool._cut_blocks(24, 24)]
    pool.move(2, to)
    assert (pool.rank_start[2], pool.rank[2], pool.generation[2]) == (to, 20, generation)
    for pair, moved in zip(before, pool._cut_blocks(to, 24), strict=True):
        assert all(torch.equal(tensor, there) for tensor, there in zip(pair, moved, strict=True))
    for start in {0, 8, 16, 24, 32, 40, 48, 56} - set(range(min(to, 24), max(to, 24) + 24, 8)):
        assert all(tensor.isnan().all() for pair in pool._cut_blocks(start, 8) for tensor in pair)
