# SPDX-License-Identifier: Apache-2.0
"""The manager's single decisions about memory: what is loaded, evicted, moved, kept, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapter_bench import SITE, Bench, version_of, weights_of
from multilora_backend.adapters.books import Books
from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.sources import Source
from multilora_backend.adapters.state import MAX_HISTORY, AdapterRecord, AdapterState
from multilora_backend.errors import ErrorCode, MultiloraError

COLD, LOADING, ACTIVE, FAILED = AdapterState.COLD, AdapterState.LOADING, AdapterState.ACTIVE, AdapterState.FAILED


def test_from_cold_to_active():
    bench = Bench({"a": 3})
    manager = bench.manager
    assert manager.lease("a") is None
    assert manager.request("a") is LOADING
    assert manager.request("a") is LOADING
    assert len(bench.loader.jobs) == 1
    assert not manager.poll().read
    bench.clock.now = 2.5
    assert bench.land() == []
    assert manager.request("a") is ACTIVE
    assert list(manager.resident()) == ["a"]
    assert manager.active_since("a") == 2.5
    lease = manager.lease("a")
    assert (lease.name, lease.version, lease.rank) == ("a", version_of("a", 3), 3)
    assert (manager.pool.rank_start[lease.slot], manager.pool.rank[lease.slot]) == (lease.rank_start, 3)
    assert torch.equal(manager.pool.b[0][lease.rank_start :][:8], weights_of("a", 3).sites[0].b)
    assert not manager.transferring
    assert manager.in_host("a")
    stats = manager.stats()
    assert stats.by_state == {"cold": 0, "loading": 0, "active": 1, "evicting": 0, "failed": 0}
    assert (stats.loads_total, stats.load_seconds) == (1, [2.5])
    assert stats.residents == {"a": ("device", 3, False)}
    assert stats.bytes["device"] == (160, 480)
    assert stats.bytes["host"][0] == weights_of("a", 3).nbytes
    assert manager.stats().load_seconds == []


def test_the_least_recently_used_without_lease_makes_room():
    bench = Bench({"a": 8, "b": 8, "c": 8, "d": 8})
    bench.activate("a", "b", "c")
    bench.clock.now += 1
    bench.manager.release(bench.manager.lease("a"))
    held = bench.manager.lease("b")
    bench.activate("d")
    assert set(bench.manager.resident()) == {"a", "b", "d"}
    assert bench.manager.stats().evictions_total == 1
    assert bench.manager.pool.rank[held.slot] == 8


def test_a_request_waits_while_everything_is_leased_or_protected():
    bench = Bench({"a": 8, "b": 8, "c": 8, "d": 8})
    manager = bench.manager
    bench.activate("a", "b", "c", "d")
    assert bench.state("a") is COLD
    leases = [manager.lease("b"), manager.lease("b"), manager.lease("c")]
    assert manager.request("a", protect={"d"}) is COLD
    assert manager.waits_for_room("a")
    manager.release(leases[0])
    assert manager.request("a", protect={"d"}) is COLD
    manager.release(leases[1])
    assert manager.request("a", protect={"d"}) is LOADING
    assert not manager.waits_for_room("a")
    assert bench.state("b") is COLD


def test_free_ranks_that_lie_apart_are_moved_together_under_leases():
    bench = Bench({"a": 8, "b": 8, "c": 16})
    manager = bench.manager
    bench.activate("a", "b")
    bench.reconcile(a=None)
    lease = manager.lease("b")
    assert manager.pool.rank_start[lease.slot] == 8
    bench.activate("c")
    assert set(manager.resident()) == {"b", "c"}
    start = int(manager.pool.rank_start[lease.slot])
    assert start != 8
    assert torch.equal(manager.pool.b[0][start : start + 8], weights_of("b", 8).sites[0].b)
    manager.release(lease)


def test_a_place_that_is_reserved_cannot_be_taken():
    bench = Bench({"a": 24, "b": 24})
    bench.activate("a", "b")
    assert bench.manager.request("a") is LOADING
    assert bench.manager.request("b") is COLD
    bench.land()
    bench.manager.poll()
    assert bench.manager.request("b") is LOADING
    assert bench.state("a") is COLD


def test_unknown_ranks_that_find_no_room_keep_what_was_read():
    bench = Bench({"a": 24, "b": 24})
    bench.activate("a")
    lease = bench.manager.lease("a")
    assert bench.manager.request("b") is LOADING
    bench.land()
    assert bench.state("b") is COLD
    assert bench.manager.in_host("b")
    bench.manager.poll()
    assert bench.manager.request("b") is COLD
    assert not bench.loader.jobs
    bench.manager.release(lease)
    assert bench.manager.request("b") is LOADING
    bench.land()
    assert bench.state("b") is ACTIVE
    assert bench.loader.read == ["a", "b"]


@pytest.mark.parametrize(("checked", "read"), [(8, 16), (16, 3)])
def test_a_place_for_another_rank_than_what_is_read_is_given_back(checked, read):
    bench = Bench({"a": checked, "b": 8, "c": 4}, ranks=32)
    bench.manager.check_all()
    bench.land()
    assert bench.manager.request("a") is LOADING
    assert bench.manager.request("b") is LOADING
    bench.loader.content["a"] = read
    bench.settle()
    bench.activate("c")
    pool, sizes = bench.manager.pool, {"a": read, "b": 8, "c": 4}
    for name in bench.manager.resident():
        start = int(pool.rank_start[bench.manager.lease(name).slot])
        assert torch.equal(
            pool.b[0][start : start + sizes[name]], weights_of(name, sizes[name]).sites[0].b[: sizes[name]]
        )
    assert set(bench.manager.resident()) == {"a", "b", "c"}


def test_loads_under_way_are_bounded():
    bench = Bench({f"a{i}": 1 for i in range(9)}, load_threads=2)
    states = [bench.manager.request(f"a{i}") for i in range(9)]
    assert states == [LOADING] * 4 + [COLD] * 5
    assert not bench.manager.waits_for_room("a8")


def test_leases_are_counted_and_cannot_be_given_back_twice():
    bench = Bench({"a": 8})
    bench.activate("a")
    one, two = bench.manager.lease("a"), bench.manager.lease("a")
    assert one == two
    bench.manager.release(one)
    bench.manager.release(two)
    with pytest.raises(RuntimeError, match="not held"):
        bench.manager.release(two)


def test_lora_that_is_off():
    manager = AdapterManager(None, [SITE], device_bytes=0, host_bytes=0, dtype=torch.float32, device="cpu")
    for call in (manager.resolve, manager.request, manager.show, manager.load, manager.unload, manager.pin):
        with pytest.raises(MultiloraError, match=r"^LoRA feature is not enabled\.$") as error:
            call("doll")
        assert error.value.code is ErrorCode.INVALID_ARG
    assert manager.pool is None
    assert not manager.poll().failed
    manager.close()


def test_active_only_when_the_last_byte_has_arrived():
    bench = Bench({"a": 8, "b": 8, "c": 8, "d": 8}, hold=True)
    manager = bench.manager
    for name in "abc":
        manager.request(name)
    bench.land()
    assert manager.transferring
    bench.arrive(1)
    bench.clock.now = 3.0
    manager.poll()
    assert list(manager.resident()) == ["a"]
    assert manager.lease("b") is None
    assert manager.stats().load_seconds == [3.0]
    # What is on its way is no victim, and asking again starts nothing.
    assert manager.request("b") is LOADING
    assert manager.request("d") is LOADING
    bench.land()
    assert manager.request("a") is COLD
    assert bench.state("b") is bench.state("c") is bench.state("d") is LOADING
    bench.arrive()
    manager.poll()
    assert not manager.transferring
    assert set(manager.resident()) == {"b", "c", "d"}


def test_a_slot_used_again_has_another_generation():
    bench = Bench({"a": 24, "b": 24})
    leases = []
    for name in "aba":
        bench.activate(name)
        leases.append(bench.manager.lease(name))
        bench.manager.release(leases[-1])
    assert len({lease.slot for lease in leases}) == 1
    assert len({lease.generation for lease in leases}) == 3


def test_an_adapter_is_cold_since_it_was_made():
    books = Books(lambda: 7.5)
    record = AdapterRecord("a", AdapterEntry("a", Source.of_folder(Path("/a"))))
    books.add(record)
    assert (record.state, record.since) == (COLD, 7.5)


def test_illegal_transitions():
    record = AdapterRecord("a", AdapterEntry("a", Source.of_folder(Path("/a"))))
    with pytest.raises(RuntimeError, match="illegal transition COLD -> ACTIVE"):
        record.transition(ACTIVE, 0.0)
    with pytest.raises(RuntimeError, match="a reason belongs to FAILED"):
        record.transition(FAILED, 0.0)
    record.transition(LOADING, 1.0)
    record.transition(ACTIVE, 2.0)
    record.leases = 1
    with pytest.raises(RuntimeError, match="EVICTING while 1 leases are held"):
        record.transition(AdapterState.EVICTING, 3.0)
    assert (record.state, record.since) == (ACTIVE, 2.0)
    assert record.history == [(1.0, LOADING, ""), (2.0, ACTIVE, "")]
    record.leases = 0
    for _ in range(10):
        for state in (AdapterState.EVICTING, COLD, LOADING, ACTIVE):
            record.transition(state, 4.0)
    assert len(record.history) == MAX_HISTORY
