# SPDX-License-Identifier: Apache-2.0
"""The host level between disk and device: what comes back from there, what is brought there, what it costs."""

from __future__ import annotations

import gc
import weakref

from adapter_bench import Bench
from multilora_backend.adapters.state import AdapterState

COLD, LOADING, ACTIVE = AdapterState.COLD, AdapterState.LOADING, AdapterState.ACTIVE


def test_coming_back_from_the_host_reads_nothing():
    bench = Bench({"a": 24, "b": 24})
    bench.activate("a", "b", "a", "b")
    assert bench.loader.read == ["a", "b"]
    bench = Bench({"a": 24, "b": 24}, host_bytes=0)
    bench.activate("a", "b", "a", "b")
    assert bench.loader.read == ["a", "b", "a", "b"]


def test_what_is_watched_comes_back_from_the_host_without_a_thread():
    bench = Bench({"a": 24, "b": 24}, watched=True)
    bench.activate("a", "b")
    assert bench.manager.request("a") is LOADING
    assert not bench.loader.jobs
    bench.manager.poll()
    assert bench.state("a") is ACTIVE


def test_copies_begun_between_two_polls_are_bounded():
    names = [f"a{i}" for i in range(7)]
    bench = Bench(dict.fromkeys(names, 8), ranks=7 * 8, watched=True, load_threads=4)
    for name in names:
        bench.manager.prefetch(name)
    bench.land()
    assert [bench.manager.request(name) for name in names] == [LOADING] * 4 + [COLD] * 3
    assert not bench.manager.waits_for_room("a6")
    bench.manager.poll()
    assert [bench.manager.request(name) for name in names] == [ACTIVE] * 4 + [LOADING] * 3


def test_who_asks_for_what_is_being_prefetched_is_not_overtaken():
    bench = Bench({"a": 8, "b": 8})
    bench.manager.prefetch("a")
    assert bench.manager.request("b") is LOADING
    assert bench.loader.hurried == []
    assert bench.manager.request("a") is LOADING
    assert bench.loader.hurried == ["a"]
    bench.land()
    assert (bench.state("a"), bench.state("b")) == (ACTIVE, ACTIVE)


def test_prefetched_to_the_host_and_from_there_when_it_is_asked_for():
    bench = Bench({"a": 8, "b": 8})
    manager = bench.manager
    manager.prefetch("a")
    manager.prefetch("a")
    manager.prefetch("b")
    assert len(bench.loader.jobs) == 2
    assert manager.request("b") is LOADING  # while it is being read: nothing is read twice
    assert len(bench.loader.jobs) == 2
    bench.land()
    assert bench.state("a") is COLD
    assert manager.in_host("a")
    manager.prefetch("a")
    manager.poll()
    assert not bench.loader.jobs
    assert manager.stats().residents == {"a": ("host", 8, False), "b": ("device", 8, False)}


def test_costs_of_a_load_by_level():
    bench = Bench({"a": 8, "b": 8, "bad": "broken"}, hold=True)
    manager = bench.manager
    unread = manager.load_cost_s("a")
    assert unread >= 0
    manager.prefetch("a")
    bench.land()
    host = manager.load_cost_s("a")
    manager.prefetch("b")
    bench.land()
    cold = Bench({"c": 8}).manager.load_cost_s("c")
    assert cold == 0.0, "nothing is known of any adapter's size"
    assert 0 < host < manager.load_cost_s("bad"), "of unknown size and on the disk"
    manager.request("a")
    assert 0 < manager.load_cost_s("a") <= host
    bench.settle()
    assert manager.load_cost_s("a") == 0
    manager.request("bad")
    bench.settle()
    assert manager.load_cost_s("bad") == float("inf")


def test_host_memory_is_kept_until_it_has_been_copied():
    bench = Bench({"a": 8}, hold=True, host_bytes=0)
    bench.manager.request("a")
    bench.loader.run()
    weights = weakref.ref(bench.loader.outcomes[0].weights)
    bench.manager.poll()
    bench.held[0].now = lambda: None
    gc.collect()
    assert weights() is not None
    bench.arrive()
    bench.manager.poll()
    gc.collect()
    assert weights() is None


def test_a_change_that_is_found_while_nobody_waits_is_told_to_nobody():
    """As when the scheduler preloads: the revision is gone by then, and nothing may ask about it."""
    bench = Bench({"a": 3, "b": 24}, host_bytes=0)
    manager = bench.manager
    bench.activate("a", "b")
    bench.loader.change("a", 5)
    manager.request("a")
    bench.loader.run()
    polled = manager.poll()
    assert (polled.failed, polled.moved) == ([], [])
    assert manager.records.keys() == {"a@2", "b"}
    bench.activate(manager.resolve("a"))
