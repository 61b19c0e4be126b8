# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from multilora_backend.adapters.host import MAX_PASSES, HostCache
from multilora_backend.adapters.layout import AdapterWeights, Buffer
from profiles import examples


def weights_of(version: str, nbytes: int) -> AdapterWeights:
    buffer = Buffer(torch.empty(0), sizes=(), nbytes=nbytes)
    return AdapterWeights(version, rank=1, sites=(), buffers=(buffer,), no_effect=False)


def test_keeps_the_most_recently_used_within_its_bytes():
    cache = HostCache(100)
    for version in "abc":
        assert cache.put(weights_of(version, 30))
    assert cache.get("a") is not None
    cache.put(weights_of("d", 40))
    assert [v in cache for v in "abcd"] == [True, False, True, True]
    assert (cache.nbytes, len(cache)) == (100, 3)
    assert cache.get("b") is None


def test_refuses_what_is_larger_than_itself_and_counts_once():
    cache = HostCache(100)
    cache.put(weights_of("a", 60))
    assert not cache.put(weights_of("b", 101))
    cache.put(weights_of("a", 60))
    assert ("a" in cache, "b" in cache, cache.nbytes) == (True, False, 60)
    cache = HostCache(0)
    assert not cache.put(weights_of("a", 1))
    assert len(cache) == 0


def test_of_those_unused_for_long_the_cheapest_to_get_again_goes_first():
    cache = HostCache(800)
    for version, seconds in zip("abcdefgh", (9, 1, 0, 0, 0, 0, 0, 0), strict=True):
        cache.put(weights_of(version, 100), reload_s=seconds)
    cache.put(weights_of("i", 100))
    # a and b are the oldest quarter; c costs nothing but was used later.
    assert [v for v in "abcdefghi" if v not in cache] == ["b"]


def test_cost_is_counted_by_the_byte():
    cache = HostCache(1100)
    for version, nbytes, seconds in (("a", 300, 2), ("b", 100, 1), *((v, 100, 0) for v in "cdefgh")):
        cache.put(weights_of(version, nbytes), reload_s=seconds)
    cache.put(weights_of("i", 200))
    # b takes less time in all, and more for what its going would free.
    assert [v for v in "abcdefghi" if v not in cache] == ["a"]


def test_nothing_is_spared_for_ever():
    cache = HostCache(800)
    cache.put(weights_of("dear", 100), reload_s=1000)
    for i in range(7 + MAX_PASSES):
        cache.put(weights_of(str(i), 100))
    assert "dear" in cache
    cache.put(weights_of("last", 100))
    assert "dear" not in cache


def test_what_is_held_stays_and_comes_back_as_the_newest():
    cache = HostCache(100)
    for version in "abc":
        cache.put(weights_of(version, 30))
    assert cache.hold("a")
    assert cache.hold("a")
    assert not cache.hold("x")
    assert cache.held_bytes == 30
    assert not cache.put(weights_of("big", 80))
    assert [v in cache for v in "abc"] == [True, True, True]
    assert cache.put(weights_of("d", 70))
    assert [v in cache for v in "abcd"] == [True, False, False, True]
    cache.drop("a")
    assert not cache.remove("a")
    cache.drop("a")
    assert cache.held_bytes == 0
    cache.put(weights_of("e", 10))
    assert [v in cache for v in "ade"] == [True, False, True]
    assert cache.remove("a")
    assert not cache.remove("a")
    assert cache.nbytes == 10
    with pytest.raises(KeyError):
        cache.drop("e")


class HostCacheMachine(RuleBasedStateMachine):
    """Against a model: who is held, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = HostCache(100)
        self.held: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    @rule(size=st.integers(1, 120), seconds=st.floats(0, 10))
    def put(self, size, seconds):
        version = f"v{len(self.sizes)}"
        self.sizes[version] = size
        held = sum(self.sizes[v] for v in self.held)
        assert self.cache.put(weights_of(version, size), seconds) == (size + held <= 100)
        assert (version in self.cache) == (size + held <= 100)

    @rule(n=st.integers(0, 9))
    def hold(self, n):
        version = f"v{max(len(self.sizes) - n, 0)}"
        if self.cache.hold(version):
            self.held[version] = self.held.get(version, 0) + 1
        else:
            assert version not in self.cache

    @rule(n=st.integers(0, 9))
    def drop(self, n):
        if self.held:
            version = sorted(self.held)[n % len(self.held)]
            self.cache.drop(version)
            self.held[version] -= 1
            self.held = {v: count for v, count in self.held.items() if count}

    @rule(n=st.integers(0, 9))
    def remove(self, n):
        version = f"v{max(len(self.sizes) - n, 0)}"
        idle = version in self.cache and version not in self.held
        assert self.cache.remove(version) == idle

    @invariant()
    def budget_and_holds(self):
        kept = [version for version in self.sizes if version in self.cache]
        assert self.cache.nbytes == sum(self.sizes[v] for v in kept) <= 100
        assert len(self.cache) == len(kept)
        assert set(self.held) <= set(kept)
        assert self.cache.held_bytes == sum(self.sizes[v] for v in self.held)


HostCacheMachine.TestCase.settings = examples(30, stateful_step_count=40)
TestHostCacheMachine = HostCacheMachine.TestCase
