# SPDX-License-Identifier: Apache-2.0
"""What becomes of compositions when their parts change, go, fail, or are evicted."""

from __future__ import annotations

import pytest

from adapter_bench import Bench, version_of
from composition_bench import active, expected, is_there
from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import MultiloraError

ACTIVE, COLD, FAILED = AdapterState.ACTIVE, AdapterState.COLD, AdapterState.FAILED


def test_a_changed_part_gives_another_composition_and_who_has_begun_ends_with_the_old():
    bench = Bench({"a": 3, "b": 4}, ranks=64, watched=True)
    old = active(bench, "a:0.5,b:2")
    lease = bench.manager.lease(old)
    bench.loader.change("a", 5)
    bench.reconcile()
    bench.settle()
    new = active(bench, "a:0.5,b:2")
    assert new != old
    assert is_there(bench, new, expected(a=(5, "0.5"), b=(4, "2")))
    bench.manager.release(lease)
    assert is_there(bench, old, expected(a=(3, "0.5"), b=(4, "2")))
    bench.manager.drop(old)
    bench.settle()
    assert old not in bench.manager.records
    assert bench.manager.pool.rank.sum() == 9, "its bytes are free"
    assert version_of("a", 3) not in bench.manager._life.host


def test_an_old_part_is_kept_until_the_composition_has_been_made_of_it():
    bench = Bench({"a": 3, "b": 4}, ranks=64, watched=True)
    bench.activate("a", "b")
    key = bench.manager.resolve("a:0.5,b:2")
    bench.manager.hold(key)
    bench.loader.change("a", 5)
    bench.reconcile()
    bench.settle()
    bench.activate(key)
    assert is_there(bench, key, expected(a=(3, "0.5"), b=(4, "2")))


def test_an_old_part_on_the_device_makes_room_for_the_composition_unless_somebody_runs_with_it():
    bench = Bench({"a": 16}, more_folders={"new": 3}, watched=True, host_bytes=0)
    manager = bench.manager
    bench.activate("a")
    key = manager.resolve("a:0.5")
    for held in (key, key, "a"):
        manager.hold(held)
    bench.reconcile(a=bench.entry("a", "new"))
    bench.settle()
    assert manager.resolve("a") == "a@2"
    assert manager.request(key) is COLD
    assert manager.waits_for_room(key)
    assert bench.state("a") is ACTIVE
    manager.drop("a")
    manager.poll()
    bench.activate(key)
    assert is_there(bench, key, expected(a=(16, "0.5")))


@pytest.mark.parametrize("host_bytes", [0, 10**6])
def test_unloading_a_part(host_bytes):
    bench = Bench({"a": 3, "b": 4}, ranks=64, watched=True, host_bytes=host_bytes)
    key = active(bench, "a:0.5,b:2")
    idle = bench.manager.resolve("a:0.25")
    bench.manager.unload("a")
    assert bench.manager.draining("a")
    assert idle not in bench.manager.records, "nobody has it"
    with pytest.raises(MultiloraError, match="LoRA a is not supported"):
        bench.manager.resolve("a:0.5,b:2")
    assert is_there(bench, key, expected(a=(3, "0.5"), b=(4, "2")))
    bench.manager.drop(key)
    bench.settle()
    assert not bench.manager.draining("a")
    assert list(bench.manager.records) == ["b"]


@pytest.mark.parametrize("watched", [True, False])
def test_evicted_it_comes_back_from_the_host(watched):
    bench = Bench({"a": 3, "b": 4, "big": 20}, ranks=24, watched=watched)
    key = active(bench, "a:0.5,b:2")
    bench.activate("big")
    assert bench.state(key) is COLD
    bench.loader.read.clear()
    bench.activate(key)
    assert is_there(bench, key, expected(a=(3, "0.5"), b=(4, "2")))
    assert bench.loader.read == []


def test_unwatched_a_part_that_was_changed_is_seen():
    bench = Bench({"a": 3, "b": 4, "big": 20}, ranks=24)
    key = active(bench, "a:0.5,b:2")
    bench.activate("big")
    bench.loader.change("a", 5)
    bench.manager.request(key)
    bench.loader.run()
    polled = bench.manager.poll()
    (moved,) = [pair for pair in polled.moved if pair[0] == key]
    bench.manager.hold(moved[1])
    bench.manager.drop(key)
    bench.activate(moved[1])
    assert is_there(bench, moved[1], expected(a=(5, "0.5"), b=(4, "2")))
    assert key not in bench.manager.records


def test_a_part_that_changed_under_the_device_copy_is_followed():
    bench = Bench({"a": 3, "b": 4}, ranks=64, host_bytes=0)
    bench.activate("a")
    lease = bench.manager.lease("a")
    key = bench.manager.resolve("a:0.5,b:2")
    bench.manager.hold(key)
    bench.loader.change("a", 5)
    bench.manager.request(key)
    bench.loader.run()
    ((before, after),) = bench.manager.poll().moved
    assert before == key
    assert bench.manager.records[lease.name].state is ACTIVE, "who runs with it goes on"
    bench.manager.hold(after)
    bench.activate(after)
    assert is_there(bench, after, expected(a=(5, "0.5"), b=(4, "2")))


@pytest.mark.parametrize(("content", "code"), [("it is odd", "it is odd"), (OSError("away"), "away")])
def test_a_part_that_fails_ends_them_with_its_reason(content, code):
    bench = Bench({"a": 3, "b": content}, watched=True)
    key = bench.manager.resolve("a:0.5,b:2")
    bench.manager.hold(key)
    bench.manager.request(key)
    assert set(bench.land()) == {key, "b"}
    assert bench.manager.reason(key) == f"LoRA a:0.5,b:2 could not be loaded: its part b: {code}"
    bench.manager.drop(key)
    with pytest.raises(MultiloraError, match=f"LoRA b could not be loaded: {code}"):
        bench.manager.resolve("a:0.5,b:2")
    assert bench.manager.resolve("a:0.5"), "the other part is fine"
    bench.loader.change("b", 4)
    bench.reconcile()
    bench.clock.now += 5
    bench.settle()
    active(bench, "a:0.5,b:2")


def test_a_pinned_content_of_a_part_is_respected():
    bench = Bench({"a": 3}, watched=True, more_folders={"x": 4})
    bench.manager.load("x", version="abcdef")
    key = bench.manager.resolve("a:0.5,x:2")
    bench.manager.hold(key)
    bench.manager.request(key)
    assert "x" in bench.land()
