# SPDX-License-Identifier: Apache-2.0
"""What the step loop pays for the manager with 10,000 names registered, against 100."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from adapter_bench import Bench
from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import MultiloraError

RESIDENT = 64
SLACK = 4.0
"""Timings of a shared machine; what goes through all names would be 100 times as slow."""
TURN_S = 1e-3
"""A step's calls in all: requests and leases of 64 adapters, 512 sequences, polls."""


def filled(count: int) -> Bench:
    bench = Bench({f"a{i}": 8 for i in range(count)}, ranks=RESIDENT * 8, watched=True)
    bench.manager.check_all()
    bench.settle(1)
    bench.activate(*[f"a{i}" for i in range(RESIDENT)])
    return bench


def turn(bench: Bench) -> None:
    manager = bench.manager
    manager.poll()
    keys = [manager.resolve(f"a{i % RESIDENT}") for i in range(64)]
    for key in keys:
        manager.hold(key)
        manager.request(key, protect=keys)
        manager.load_cost_s(key)
    leases = [manager.lease(key) for key in keys]
    for key, lease in zip(keys, leases, strict=True):
        manager.release(lease)
        manager.drop(key)
    manager.request("a99", protect=keys)  # in vain
    manager.resident()
    manager.stats()


def fastest(action, times: int = 20) -> float:
    best = float("inf")
    for _ in range(times):
        begin = time.thread_time()
        action()
        best = min(best, time.thread_time() - begin)
    return best


def test_a_turn_costs_the_same_however_many_are_registered():
    few, many = filled(100), filled(10_000)
    seconds = fastest(lambda: turn(few)), fastest(lambda: turn(many))
    print("a turn with 100 and 10,000 names, us:", *(f"{1e6 * s:.0f}" for s in seconds))
    assert seconds[1] < SLACK * seconds[0]
    assert seconds[1] < SLACK * TURN_S

    def unknown():
        with pytest.raises(MultiloraError):
            many.manager.resolve("nobody")

    assert fastest(unknown) < SLACK * 1e-4


def test_a_watched_change_of_one_in_ten_thousand():
    bench = filled(10_000)
    entries = {entry.name: entry for entry in bench.manager.registry.entries()}  # the same objects, as the watcher has
    bench.manager.reconcile(entries.values())
    bench.loader.change("a7", 5)
    entries["a7"] = bench.entry("a7")
    del entries["a8"]
    entries["new"] = replace(entries["a9"], name="new")
    begin = time.thread_time()
    assert bench.manager.reconcile(entries.values()) == {}
    seconds = time.thread_time() - begin
    print(f"reconciled in {1e3 * seconds:.1f} ms")
    assert seconds < 0.05
    bench.settle()
    assert bench.manager.show("a7").state in ("cold", "active")
    assert bench.state("a9") is AdapterState.ACTIVE
    assert len(bench.manager.names()) == 10_000
