# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from multilora_backend.adapters.host import HostCache
from multilora_backend.adapters.peft import AdapterWeights, read_adapter
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.errors import MultiloraError


def bytes_per_rank(sites, itemsize=4):
    return itemsize * sum(len(site.modules) * site.in_features + site.width for site in sites)


def test_budget_becomes_whole_pages(sites):
    per_rank = bytes_per_rank(sites)
    pool = DevicePool(sites, 24 * per_rank - 1, torch.float32, "cpu")
    assert (pool.bytes_per_rank, pool.num_ranks, pool.num_slots) == (per_rank, 16, 2)
    assert sum(t.nbytes for t in [*pool.a, *pool.b]) == 16 * per_rank
    assert [tuple(a.shape) for a in pool.a[:4]] == [(3, 16, 32), (1, 16, 32), (2, 16, 32), (1, 16, 40)]
    assert [tuple(b.shape) for b in pool.b[:4]] == [(16, 64), (16, 32), (16, 80), (16, 32)]
    assert not any(t.any() for t in [*pool.a, *pool.b])
    assert DevicePool(sites, 24 * per_rank, torch.bfloat16, "cpu").num_ranks == 48
    assert DevicePool(sites, 2**40, torch.float32, "cpu", max_ranks=100).num_ranks == 96


def test_budget_below_one_page(sites):
    with pytest.raises(MultiloraError, match=f"^adapter_device_bytes: must be at least {8 * bytes_per_rank(sites)}"):
        DevicePool(sites, 8 * bytes_per_rank(sites) - 1, torch.float32, "cpu")


def test_what_can_never_fit_says_what_would(sites):
    pool = DevicePool(sites, 16 * bytes_per_rank(sites), torch.float32, "cpu")
    assert pool.can_ever_fit(16)
    assert pool.too_large(16) == ""
    assert not pool.can_ever_fit(17)
    assert pool.too_large(17).startswith(f"rank 17 needs adapter_device_bytes of {24 * bytes_per_rank(sites)}")


def test_write_leaves_nothing_of_earlier_owners_and_nobody_elses(save, sites):
    weights = read_adapter(save(r=11, target_modules=["q_proj", "down_proj"]), sites, torch.float32)
    pool = DevicePool(sites, 40 * bytes_per_rank(sites), torch.float32, "cpu")
    for tensor in [*pool.a, *pool.b]:
        tensor.fill_(float("nan"))
    pool.write(weights, slot=3, rank_start=8)
    assert (pool.rank_start[3], pool.rank[3]) == (8, 11)
    assert pool.rank.sum() == 11
    for a, b, site in zip(pool.a, pool.b, weights.sites, strict=True):
        if site is None:
            assert not a[:, 8:24].any()
            assert not b[8:24].any()
        else:
            assert torch.equal(a[:, 8:19], site.a)
            assert torch.equal(b[8:19], site.b)
            assert not a[:, 19:24].any()
            assert not b[19:24].any()
        for outside in (a[:, :8], a[:, 24:], b[:8], b[24:]):
            assert outside.isnan().all()
    pool.clear(3)
    assert not pool.rank.any()


def weights_of(version: str, nbytes: int) -> AdapterWeights:
    return AdapterWeights(version, rank=1, sites=(), nbytes=nbytes, parts=(), no_effect=False)


def test_host_cache_keeps_the_most_recently_used_within_its_bytes():
    cache = HostCache(100)
    for version in "abc":
        cache.put(weights_of(version, 30))
    assert cache.get("a") is not None
    cache.put(weights_of("d", 40))
    assert [v in cache for v in "abcd"] == [True, False, True, True]
    assert (cache.nbytes, len(cache)) == (100, 3)
    assert cache.get("b") is None


def test_host_cache_refuses_what_is_larger_than_itself_and_counts_once():
    cache = HostCache(100)
    cache.put(weights_of("a", 60))
    cache.put(weights_of("b", 101))
    cache.put(weights_of("a", 60))
    assert ("a" in cache, "b" in cache, cache.nbytes) == (True, False, 60)
    cache = HostCache(0)
    cache.put(weights_of("a", 1))
    assert len(cache) == 0
