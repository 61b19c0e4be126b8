# SPDX-License-Identifier: Apache-2.0
"""The manager's single decisions: what is loaded, evicted, refused, and when."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from adapter_bench import SITE, Bench, weights_of
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.state import AdapterRecord, AdapterState
from multilora_backend.errors import ErrorCode, MultiloraError

COLD, LOADING, ACTIVE, FAILED = AdapterState.COLD, AdapterState.LOADING, AdapterState.ACTIVE, AdapterState.FAILED


def test_from_cold_to_active():
    bench = Bench({"a": 3})
    manager = bench.manager
    assert manager.lease("a") is None
    assert manager.request("a") is LOADING
    assert manager.request("a") is LOADING
    assert len(bench.loader.jobs) == 1
    assert manager.poll() == []
    bench.clock.now = 2.5
    assert bench.land() == []
    assert manager.request("a") is ACTIVE
    assert list(manager.resident()) == ["a"]
    lease = manager.lease("a")
    assert (lease.name, lease.version, lease.rank) == ("a", "a-r3", 3)
    assert (manager.pool.rank_start[lease.slot], manager.pool.rank[lease.slot]) == (lease.rank_start, 3)
    assert torch.equal(manager.pool.b[0][lease.rank_start :][:8], weights_of("a", 3).sites[0].b)
    assert not manager.transferring
    assert manager.in_host("a")
    stats = manager.stats()
    assert stats.by_state == {"cold": 0, "loading": 0, "active": 1, "evicting": 0, "failed": 0}
    assert (stats.loads_total, stats.load_seconds) == (1, [2.5])
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


def test_coming_back_from_the_host_reads_nothing():
    bench = Bench({"a": 24, "b": 24})
    bench.activate("a", "b", "a", "b")
    assert bench.loader.read == ["a", "b"]
    bench = Bench({"a": 24, "b": 24}, host_bytes=0)
    bench.activate("a", "b", "a", "b")
    assert bench.loader.read == ["a", "b", "a", "b"]


def test_a_changed_folder_is_read_again_and_has_another_version(tmp_path):
    bench = Bench({"a": 24, "b": 24, "c": 8}, root=tmp_path)
    bench.activate("a")
    first = bench.manager.lease("a")
    bench.manager.release(first)
    bench.activate("b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    bench.loader.content["a"] = 9
    bench.activate("a")
    assert bench.manager.lease("a").version == "a-r9" != first.version
    bench.activate("c")  # beside a, whose place is no larger than what was read
    assert set(bench.manager.resident()) == {"a", "c"}


def test_failure_is_reported_once_with_its_reason_and_hurts_nobody_else():
    bench = Bench({"a": 8, "bad": "lora_alpha: is odd"})
    bench.activate("a")
    bench.manager.request("bad")
    assert bench.land() == ["bad"]
    assert bench.manager.poll() == []
    assert bench.manager.request("bad") is FAILED
    with pytest.raises(MultiloraError, match=r"^LoRA bad could not be loaded: lora_alpha: is odd$") as error:
        bench.manager.check("bad")
    assert error.value.code is ErrorCode.INTERNAL
    bench.manager.check("a")
    assert bench.manager.stats().load_failures_total == 1


def test_failed_becomes_cold_when_its_folder_changes(tmp_path):
    bench = Bench({"a": "broken"}, root=tmp_path)
    bench.manager.request("a")
    bench.land()
    for _ in range(3):
        bench.clock.now += 10
        with pytest.raises(MultiloraError):
            bench.manager.check("a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_model.safetensors").write_text("x")
    with pytest.raises(MultiloraError):
        bench.manager.check("a")  # looked at a moment ago
    bench.clock.now += 10
    bench.manager.check("a")
    bench.loader.content["a"] = 8
    bench.activate("a")


def test_what_can_never_fit_fails_and_names_the_setting():
    bench = Bench({"a": 25})
    bench.manager.request("a")
    assert bench.land() == ["a"]
    with pytest.raises(MultiloraError, match="rank 25 needs adapter_device_bytes of 640"):
        bench.manager.check("a")


def test_what_was_too_large_is_loaded_when_it_has_become_smaller(tmp_path):
    bench = Bench({"a": 100}, root=tmp_path)
    bench.manager.check_all()
    assert bench.land() == ["a"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    bench.loader.content["a"] = 8
    bench.clock.now += 10
    bench.manager.check("a")
    bench.activate("a")


def test_a_failure_of_the_disk_is_tried_again():
    bench = Bench({"a": OSError("I/O error")})
    bench.manager.request("a")
    assert bench.land() == ["a"]
    with pytest.raises(MultiloraError, match="I/O error"):
        bench.manager.check("a")
    bench.clock.now += 10
    bench.manager.check("a")
    bench.loader.content["a"] = 8
    bench.activate("a")


def test_a_failed_load_gives_its_place_back():
    bench = Bench({"a": 24, "b": 24})
    bench.activate("a", "b")
    bench.manager.request("a")
    bench.loader.content["a"] = "gone"
    bench.land()
    assert bench.state("a") is FAILED
    assert not bench.manager.in_host("a")
    bench.activate("b")


def test_check_all_finds_broken_adapters_and_ranks_before_they_are_asked_for():
    bench = Bench({"a": 16, "b": 16, "bad": "bias: no", "huge": 100})
    bench.manager.check_all()
    assert sorted(bench.land()) == ["bad", "huge"]
    assert not bench.loader.read
    assert bench.manager.request("a") is LOADING
    assert bench.manager.request("b") is COLD  # known not to fit beside a


def test_a_check_that_ends_late_changes_nothing():
    bench = Bench({"a": 16})
    bench.manager.check_all()
    bench.manager.request("a")
    bench.loader.content["a"] = "the check saw another moment"
    bench.loader.run(1)
    assert bench.manager.poll() == []
    assert bench.state("a") is LOADING
    bench.loader.content["a"] = 16
    bench.land()
    assert bench.state("a") is ACTIVE
    bench = Bench({"a": 24, "b": 24})
    bench.manager.check_all()
    checks, bench.loader.jobs = bench.loader.jobs, []
    bench.activate("a", "b")
    bench.loader.jobs = checks
    bench.loader.content["a"] = "the check saw another moment"
    assert bench.land() == []
    assert bench.state("a") is COLD


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
    assert hash(one) == hash(two)
    bench.manager.release(one)
    bench.manager.release(two)
    with pytest.raises(RuntimeError, match="not held"):
        bench.manager.release(two)


def test_unknown_and_disabled():
    bench = Bench({"doll": 8, "sheep": 8})
    for call in (bench.manager.check, bench.manager.request):
        with pytest.raises(
            MultiloraError, match=r"^LoRA x is not supported, we currently support \['doll', 'sheep'\]$"
        ):
            call("x")
    manager = AdapterManager(None, [SITE], device_bytes=0, host_bytes=0, dtype=torch.float32, device="cpu")
    with pytest.raises(MultiloraError, match=r"^LoRA feature is not enabled\.$") as error:
        manager.check("doll")
    assert error.value.code is ErrorCode.INVALID_ARG
    assert manager.pool is None
    assert manager.poll() == []
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
    assert manager.poll() == []
    assert not manager.transferring
    assert set(manager.resident()) == {"b", "c", "d"}


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


@pytest.mark.parametrize("at_once", [False, True])
def test_a_copy_that_fails_ends_that_load_alone(at_once):
    bench = Bench({"a": 8, "b": 8, "c": 24}, hold=True)
    manager = bench.manager
    manager.request("a")
    if at_once:
        write, manager.pool.write = manager.pool.write, Mock(side_effect=RuntimeError("CUDA error: odd"))
        assert bench.land() == ["a"]
        manager.pool.write = write
        manager.request("b")
        bench.land()
    else:
        manager.request("b")
        bench.land()
        bench.held.pop(0).error = RuntimeError("CUDA error: odd")
        assert manager.poll() == ["a"]
    assert manager.poll() == []
    with pytest.raises(MultiloraError, match=r"LoRA a could not be loaded: cannot be copied to the device: CUDA error"):
        manager.check("a")
    bench.arrive()
    manager.poll()
    assert list(manager.resident()) == ["b"]
    assert (manager.pool.rank > 0).sum() == 1
    # Its ranks are free again, and it may be tried again.
    assert manager.request("c") is LOADING
    bench.land()
    bench.arrive()
    manager.poll()
    assert bench.state("c") is ACTIVE
    bench.clock.now += 10
    manager.check("a")
    assert manager.request("a") is LOADING


def test_a_slot_used_again_has_another_generation():
    bench = Bench({"a": 24, "b": 24})
    leases = []
    for name in "aba":
        bench.activate(name)
        leases.append(bench.manager.lease(name))
        bench.manager.release(leases[-1])
    assert len({lease.slot for lease in leases}) == 1
    assert len({lease.generation for lease in leases}) == 3


def test_no_effect_is_logged(caplog):
    bench = Bench({"a": 8})
    bench.manager.request("a")
    bench.loader.run()
    outcome = bench.loader.outcomes[0]
    object.__setattr__(outcome.weights, "no_effect", True)
    bench.manager.poll()
    assert "adapter a: has no effect" in caplog.text
    assert bench.manager.records["a"].no_effect


def test_illegal_transitions():
    record = AdapterRecord("a", Path("a"))
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
