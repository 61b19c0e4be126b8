# SPDX-License-Identifier: Apache-2.0
"""Replaced, changed and unloaded under traffic: who holds a revision keeps it, then its bytes come back."""

from __future__ import annotations

import pytest
import torch

from adapter_bench import Bench, version_of, weights_of
from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import MultiloraError

COLD, LOADING, ACTIVE = AdapterState.COLD, AdapterState.LOADING, AdapterState.ACTIVE


def content_of(bench: Bench, key: str) -> torch.Tensor:
    lease = bench.manager.lease(key)
    start = int(bench.manager.pool.rank_start[lease.slot])
    rows = bench.manager.pool.b[0][start : start + lease.rank].clone()
    bench.manager.release(lease)
    return rows


def replaced(**more) -> Bench:
    """a of rank 3, held and ACTIVE, then of rank 5."""
    bench = Bench({"a": 3, "b": 24}, watched=True, **more)
    bench.manager.hold(bench.manager.resolve("a"))
    bench.activate("a")
    bench.loader.change("a", 5)
    bench.reconcile()
    return bench


def test_the_old_revision_serves_until_the_new_one_is_found_fine():
    bench = replaced()
    manager = bench.manager
    assert manager.resolve("a") == "a"
    assert manager.show("a").pending
    bench.land()
    assert manager.resolve("a") == "a@2"
    info = manager.show("a")
    assert (info.key, info.version, info.versions, info.pending) == (
        "a@2",
        version_of("a", 5),
        [version_of("a", 3)],
        False,
    )
    # Both are served at the same time, each as it is.
    bench.activate("a@2")
    assert torch.equal(content_of(bench, "a"), weights_of("a", 3).sites[0].b[:3])
    assert torch.equal(content_of(bench, "a@2"), weights_of("a", 5).sites[0].b[:5])
    manager.drop("a")
    assert manager.records.keys() == {"a@2", "b"}
    assert not manager._life.host.remove(version_of("a", 3)), "its host copy has gone with it"
    with pytest.raises(MultiloraError, match="is no version that is known"):
        manager.resolve(f"a@{version_of('a', 3)}")


def test_a_new_revision_that_is_broken_leaves_the_old_one_serving_and_says_so():
    bench = replaced()
    bench.loader.change("a", "r: is odd")
    bench.reconcile()
    assert bench.land() == [], "nobody waits for it"
    info = bench.manager.show("a")
    assert (info.key, info.state, info.pending) == ("a", "active", False)
    assert "was refused: r: is odd" in info.reason
    bench.loader.change("a", 7)
    bench.reconcile()
    bench.land()
    assert bench.manager.show("a").version == version_of("a", 7)
    assert bench.manager.show("a").reason == ""


def test_a_new_revision_that_cannot_be_read_for_now_is_tried_again():
    bench = replaced()
    bench.loader.change("a", OSError("away"))
    bench.reconcile()
    bench.land()
    bench.settle()
    info = bench.manager.show("a")
    assert (info.key, info.pending) == ("a", True)
    assert "was refused: away" in info.reason
    bench.clock.now += 1
    bench.settle()
    assert bench.manager.show("a").key == "a"
    bench.loader.content["a"] = 7
    bench.clock.now += 2
    bench.settle()
    assert (bench.manager.show("a").rank, bench.manager.show("a").reason) == (7, "")
    assert bench.manager.resolve("a") != "a"


def test_files_that_were_touched_and_say_what_they_said_change_nothing():
    bench = Bench({"a": 3}, watched=True)
    bench.activate("a")
    bench.loader.change("a", 3)
    bench.reconcile()
    bench.land()
    assert bench.manager.records.keys() == {"a"}
    assert bench.state("a") is ACTIVE
    assert bench.reconcile() == {}
    assert not bench.loader.jobs, "its new fingerprint is known"


def test_what_is_held_survives_on_the_host_when_the_device_is_needed():
    bench = replaced()
    bench.land()
    bench.activate("b")
    assert bench.state("a") is COLD
    bench.loader.change("a", "gone")
    bench.activate("a")
    assert torch.equal(content_of(bench, "a"), weights_of("a", 3).sites[0].b[:3])


def test_what_is_held_and_only_on_the_device_is_not_evicted():
    bench = replaced(host_bytes=0)
    bench.land()
    assert bench.manager.resolve("a") == "a@2"
    bench.manager.check_all()
    bench.land()
    assert bench.manager.request("b") is COLD
    assert bench.manager.waits_for_room("b")
    bench.manager.drop("a")
    bench.activate("b")


def test_a_folder_that_changed_unseen_is_the_next_revision_when_it_is_read():
    bench = Bench({"a": 3, "b": 24}, host_bytes=0)
    manager = bench.manager
    bench.activate("a", "b")
    manager.hold("a")
    bench.loader.change("a", 5)
    assert manager.request("a") is LOADING
    bench.loader.run()
    polled = manager.poll()
    assert (polled.failed, polled.moved) == ([], [("a", "a@2")])
    assert manager.resolve("a") == "a@2"
    manager.hold("a@2")
    manager.drop("a")
    assert manager.records.keys() == {"a@2", "b"}
    bench.activate("a@2")
    assert manager.show("a").version == version_of("a", 5)


def test_a_change_that_is_found_while_a_newer_source_is_looked_at_leads_to_that_one():
    bench = Bench({"a": 3, "b": 24}, more_folders={"new": 6}, watched=True, host_bytes=0)
    manager = bench.manager
    bench.activate("a", "b")
    manager.hold("a")
    bench.reconcile(a=bench.entry("a", "new"))
    check, bench.loader.jobs = bench.loader.jobs, []
    bench.loader.change("a", 5)
    manager.request("a")
    bench.loader.run()
    assert manager.poll().moved == [("a", "a@2")]
    bench.loader.jobs += check
    bench.activate(manager.resolve("a"))
    assert manager.show("a").version == version_of("new", 6)


def test_who_waits_for_a_replaced_revision_whose_source_is_gone_goes_on_with_its_successor():
    bench = Bench({"a": 3, "b": 24}, more_folders={"new": 5}, watched=True, host_bytes=0)
    manager = bench.manager
    bench.activate("a", "b")
    manager.hold("a")
    bench.reconcile(a=bench.entry("a", "new"))
    bench.settle()
    assert manager.resolve("a") == "a@2"
    bench.loader.change("a", "does not exist")
    assert manager.request("a") is LOADING
    bench.loader.run()
    assert manager.poll().moved == [("a", "a@2")]
    # Its source is unchanged on the other hand: it is read once more.
    bench = Bench({"a": 3, "b": 24}, more_folders={"new": 5}, watched=True, host_bytes=0)
    bench.activate("a", "b")
    bench.manager.hold("a")
    bench.reconcile(a=bench.entry("a", "new"))
    bench.settle()
    bench.activate("a")


def test_unload_drains_then_gives_the_bytes_back():
    bench = Bench({"a": 3, "b": 5})
    manager = bench.manager
    bench.activate("a", "b")
    manager.hold("a")
    lease = manager.lease("a")
    manager.unload("a")
    manager.unload("a")
    with pytest.raises(MultiloraError, match=r"^LoRA a is not supported, we currently support \['b'\]$"):
        manager.resolve("a")
    assert manager.draining("a")
    assert bench.state("a") is ACTIVE
    manager.release(lease)
    assert manager.draining("a")
    manager.drop("a")
    assert not manager.draining("a")
    assert manager.records.keys() == {"b"}
    assert (manager.pool.rank > 0).sum() == 1
    assert manager._life.host.nbytes == weights_of("b", 5).nbytes
    with pytest.raises(RuntimeError, match="not held"):
        manager.drop("b")
    # A configured adapter stays away until it is loaded by a command again.
    bench.reconcile()
    assert "a" not in manager.registry
    manager.load("a")
    assert manager.resolve("a") == "a"


def test_what_is_still_leased_when_its_holder_has_gone_is_given_back_with_the_lease():
    bench = Bench({"a": 3})
    bench.activate("a")
    bench.manager.hold("a")
    lease = bench.manager.lease("a")
    bench.manager.unload("a")
    bench.manager.drop("a")
    assert bench.state("a") is ACTIVE
    bench.manager.release(lease)
    assert not bench.manager.records


def test_unload_while_it_is_being_read_or_copied():
    bench = Bench({"a": 3, "b": 5}, hold=True)
    manager = bench.manager
    for name in "ab":
        manager.request(name)
    bench.loader.run(1)
    manager.poll()
    for name in "ab":
        manager.unload(name)
        assert manager.draining(name)
    manager.load("a")
    assert manager.resolve("a") == "a@2", "the key belongs to the one that drains"
    bench.settle()
    assert manager.records.keys() == {"a@2"}
    assert not manager.pool.rank.any()


def test_the_same_content_under_two_names_goes_with_the_last_of_them():
    bench = Bench({"a": 3}, more_folders={"x": 4})
    manager = bench.manager
    for name in ("one", "two"):
        manager.load(name, "x")
        bench.settle()
    nbytes = manager._life.host.nbytes
    manager.unload("one")
    assert manager._life.host.nbytes == nbytes
    manager.unload("two")
    assert manager._life.host.nbytes == 0
