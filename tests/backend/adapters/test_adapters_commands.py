# SPDX-License-Identifier: Apache-2.0
"""Commands and the configured source: idempotent, all or nothing, and never in each other's way."""

from __future__ import annotations

import pytest

from adapter_bench import Bench, version_of
from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import ErrorCode, MultiloraError

COLD, LOADING, ACTIVE, FAILED = AdapterState.COLD, AdapterState.LOADING, AdapterState.ACTIVE, AdapterState.FAILED


def test_loaded_by_name_and_served():
    bench = Bench({"a": 3}, more_folders={"new": 5, "other": 7})
    manager = bench.manager
    manager.load("x", "new")
    manager.load("x", "new")
    assert manager.resolve("x") == "x"
    assert len(bench.loader.jobs) == 1
    bench.settle()
    info = manager.show("x")
    assert (info.level, info.origin, info.source, info.rank) == ("host", "admin", "/nowhere/new", 5)
    assert (info.requests_total, info.last_used_s) == (0, None)
    manager.load("new")
    bench.settle()
    assert [info.name for info in manager.list()] == manager.names() == ["a", "new", "x"]
    assert manager.names("n", "cold") == ["new"]
    assert manager.names(state="active") == []
    manager.load("x", "other")
    bench.settle()
    assert manager.show("x").version == version_of("other", 7)
    assert manager.records.keys() == {"a", "new", "x@2"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"name": "x", "source": "secret/x"}, "not below any of adapter_roots"),
        ({"name": "../x", "source": "new"}, "must not contain"),
        ({"name": "a", "source": "new"}, "'a' is taken: it comes from the configured adapters"),
        ({"name": "prod", "source": "new"}, "'prod' is an alias of 'a'"),
        ({"name": "x", "source": "new", "version": "v1"}, "version: must be hexadecimal digits"),
        ({"name": "a", "tenants": ["t"]}, "tenants: of 'a' is set where the adapter is configured"),
        ({"name": "a", "version": "abcdef"}, "version: of 'a' is set where"),
    ],
)
def test_loads_that_are_refused_change_nothing(arguments, problem):
    bench = Bench({"a": 3}, more_folders={"new": 5})
    bench.manager.alias("prod", "a")
    with pytest.raises(MultiloraError, match=problem):
        bench.manager.load(arguments.pop("name"), **arguments)
    assert bench.manager.names() == ["a"]
    assert bench.manager.records.keys() == {"a"}
    assert not bench.loader.jobs


def test_a_version_that_the_source_does_not_have_is_refused():
    bench = Bench({}, more_folders={"new": 5})
    manager = bench.manager
    manager.load("x", "new", version=version_of("new", 5)[:8])
    bench.settle()
    assert manager.show("x").level == "host"
    manager.load("x", "new", version="ffffff")
    bench.settle()
    info = manager.show("x")
    assert (info.version, info.pending) == (version_of("new", 5), False)
    assert "refused: version ffffff was asked for, and the source has " in info.reason
    manager.load("y", "new", version="ffffff")
    bench.settle()
    assert manager.show("y").state == "failed"


def test_load_reads_a_source_anew():
    bench = Bench({}, more_folders={"new": 5})
    manager = bench.manager
    manager.load("x", "new")
    bench.activate("x")
    manager.load("x")
    assert manager.show("x").pending
    bench.settle()
    assert manager.records.keys() == {"x"}, "nothing has changed"
    bench.loader.change("new", "broken")
    manager.load("x")
    bench.settle()
    assert "was refused: broken" in manager.show("x").reason
    assert manager.show("x").state == "active"
    bench.loader.change("new", 7)
    manager.load("x", tenants=["acme"])
    bench.settle()
    info = manager.show("x")
    assert (info.key, info.version, info.reason, info.tenants) == ("x@2", version_of("new", 7), "", ["acme"])


def test_load_tries_what_failed_at_once():
    bench = Bench({}, more_folders={"new": OSError("away")})
    manager = bench.manager
    manager.load("x", "new")
    bench.settle()
    assert manager.show("x").reason == "away"
    bench.loader.change("new", 5)
    manager.load("x", "new")
    bench.settle()
    assert manager.show("x").level == "host"


def test_pinned_adapters_come_to_the_device_and_stay():
    bench = Bench({"a": 8, "b": 8, "c": 8, "d": 8}, watched=True)
    manager = bench.manager
    manager.pin("a")
    manager.pin("a")
    bench.settle()
    assert bench.state("a") is ACTIVE
    for name in "bcdbcd":
        bench.activate(name)
    assert bench.state("a") is ACTIVE
    assert manager.stats().residents["a"] == ("device", 8, True)
    # Its successor is pinned in its place.
    bench.loader.change("a", 7)
    bench.reconcile()
    bench.settle()
    assert (manager.show("a").version, manager.show("a").pinned) == (version_of("a", 7), True)
    assert bench.state(manager.resolve("a")) is ACTIVE
    manager.unpin("a")
    manager.unpin("a")
    for name in "bcdbcd":
        bench.activate(name)
    assert bench.state(manager.resolve("a")) is COLD


def test_pinning_more_than_fits_is_refused_with_the_bytes():
    bench = Bench({"a": 16, "b": 16, "c": 8})
    manager = bench.manager
    manager.check_all()
    bench.settle()
    manager.pin("a")
    with pytest.raises(
        MultiloraError, match="b cannot be pinned: it needs 320 bytes, and of the 480 of adapter_device_bytes 320 are"
    ) as error:
        manager.pin("b")
    assert error.value.code is ErrorCode.UNAVAILABLE
    assert not manager.show("b").pinned
    bench.settle()
    # What no longer fits beside the pinned ones fails with the reason, instead of waiting for ever.
    assert manager.request("b") is FAILED
    with pytest.raises(MultiloraError, match="needs 320 bytes on the device, and pinned adapters leave 160"):
        manager.resolve("b")
    bench.activate("c")
    manager.unpin("a")
    bench.clock.now += 1
    bench.activate(manager.resolve("b"))


def test_a_pin_whose_rank_turns_out_too_large_is_noted():
    bench = Bench({"a": 16, "b": 16})
    manager = bench.manager
    manager.pin("a")
    manager.pin("b")
    bench.settle()
    pinned = [name for name in "ab" if manager.show(name).pinned]
    assert len(pinned) == 1
    (other,) = set("ab") - set(pinned)
    assert f"{other} cannot be pinned" in manager.show(other).reason


def test_preload_waits_for_room_and_does_not_stay():
    bench = Bench({"a": 24, "b": 24})
    manager = bench.manager
    bench.activate("a")
    lease = manager.lease("a")
    manager.preload("b")
    manager.preload("b")
    bench.settle()
    assert (manager.show("b").level, bench.loader.read) == ("host", ["a", "b"])
    manager.release(lease)
    bench.settle()
    assert bench.state("b") is ACTIVE
    bench.activate("a")
    bench.settle()
    assert bench.state("b") is COLD


def test_the_configured_adapters_are_reconciled():
    bench = Bench({"a": 3, "b": 5, "c": 7}, watched=True, more_folders={"d": 9})
    manager = bench.manager
    manager.load("mine", "d")
    bench.settle()
    before = manager.records["c"]
    problems = bench.reconcile(
        a=None, b=bench.entry("b", tenants=("acme",), pinned=True), d=bench.entry("d"), mine=bench.entry("mine", "d")
    )
    assert list(problems) == ["mine"]
    assert "comes from a load command" in problems["mine"]
    bench.settle()
    assert manager.names() == ["b", "c", "d", "mine"]
    assert manager.show("mine").origin == "admin"
    assert manager.resolve("b", "acme") == "b", "who may use it is no other content"
    assert (bench.state("b"), manager.show("b").pinned) == (ACTIVE, True)
    assert manager.records["c"] is before
    assert bench.loader.read == ["d", "b"]
    manager.unload("mine")
    assert bench.reconcile() == {}
    assert manager.show("mine").origin == "config"
    # What a command has unloaded is known again once it has gone from the source and come back.
    manager.unload("c")
    bench.reconcile()
    assert "c" not in manager.names()
    bench.reconcile(c=None)
    bench.reconcile(c=bench.entry("c"))
    assert "c" in manager.names()
