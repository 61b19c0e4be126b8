# SPDX-License-Identifier: Apache-2.0
"""What cannot be loaded: the reason is told once, nobody else notices, and it is tried again when that is of use."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from adapter_bench import Bench
from multilora_backend.adapters.books import MAX_RETRY_S
from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import ErrorCode, MultiloraError

COLD, LOADING, ACTIVE, FAILED = AdapterState.COLD, AdapterState.LOADING, AdapterState.ACTIVE, AdapterState.FAILED


def resolves(bench: Bench, name: str) -> bool:
    try:
        return bench.manager.resolve(name) == name
    except MultiloraError:
        return False


def test_failure_is_reported_once_with_its_reason_and_hurts_nobody_else():
    bench = Bench({"a": 8, "bad": "lora_alpha: is odd"})
    bench.activate("a")
    bench.manager.request("bad")
    assert bench.land() == ["bad"]
    assert not bench.manager.poll().failed
    assert bench.manager.request("bad") is FAILED
    with pytest.raises(MultiloraError, match=r"^LoRA bad could not be loaded: lora_alpha: is odd$") as error:
        bench.manager.resolve("bad")
    assert error.value.code is ErrorCode.INTERNAL
    assert bench.manager.resolve("a") == "a"
    assert bench.manager.stats().load_failures_total == 1
    assert bench.manager.show("bad").history[-1] == (0.0, "failed", "lora_alpha: is odd")


def test_what_is_refused_is_looked_at_again_but_not_often_and_not_by_the_step_loop():
    bench = Bench({"a": "broken"})
    manager = bench.manager
    manager.request("a")
    bench.land()
    for _ in range(3):
        bench.clock.now += 10
        for _ in range(5):
            with pytest.raises(MultiloraError, match="broken"):
                manager.resolve("a")
        assert len(bench.loader.jobs) == 1, "one look"
        bench.land()
        assert bench.state("a") is FAILED
    assert manager.stats().load_failures_total == 1
    bench.loader.change("a", 8)
    bench.clock.now += 10
    with pytest.raises(MultiloraError):
        manager.resolve("a")
    bench.land()
    assert manager.resolve("a") == "a"
    bench.activate("a")


def test_what_is_mended_under_the_eyes_of_the_watcher_is_served_at_once():
    bench = Bench({"a": "broken", "b": 8}, watched=True)
    bench.manager.check_all()
    assert bench.land() == ["a"]
    bench.loader.change("a", 8)
    assert bench.reconcile() == {}
    key = bench.manager.resolve("a")
    bench.activate(key)
    assert bench.manager.show("a").state == "active"
    assert bench.manager.records.keys() == {key, "b"}


def test_what_can_never_fit_fails_and_names_the_setting():
    bench = Bench({"a": 25})
    bench.manager.request("a")
    assert bench.land() == ["a"]
    with pytest.raises(MultiloraError, match="rank 25 needs adapter_device_bytes of 640"):
        bench.manager.resolve("a")


def test_a_failure_of_the_disk_is_tried_again_after_longer_and_longer():
    bench = Bench({"a": OSError("I/O error")})
    manager = bench.manager
    waits = []
    for _ in range(9):
        assert manager.request("a") is LOADING
        assert bench.land() == ["a"]
        failed_at = bench.clock.now
        while not resolves(bench, "a"):
            bench.clock.now += 0.5
        waits.append(bench.clock.now - failed_at)
    assert waits == [1, 2, 4, 8, 16, 32, *[MAX_RETRY_S] * 3]
    bench.loader.change("a", 8)
    bench.activate("a")
    assert manager.records["a"].attempts == 0


def test_a_failed_load_gives_its_place_back():
    bench = Bench({"a": 24, "b": 24}, host_bytes=0)
    bench.activate("a", "b")
    bench.manager.request("a")
    bench.loader.change("a", "gone")
    assert bench.land() == ["a"]
    assert bench.state("a") is FAILED
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
    assert bench.manager.poll().failed == []
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
        assert manager.poll().failed == ["a"]
    assert manager.poll().failed == []
    with pytest.raises(MultiloraError, match=r"LoRA a could not be loaded: cannot be copied to the device: CUDA error"):
        manager.resolve("a")
    bench.settle()
    assert list(manager.resident()) == ["b"]
    assert (manager.pool.rank > 0).sum() == 1
    # Its ranks are free again, and it may be tried again.
    assert manager.request("c") is LOADING
    bench.settle()
    assert bench.state("c") is ACTIVE
    bench.clock.now += 10
    assert manager.resolve("a") == "a"
    assert manager.request("a") is LOADING


def test_no_effect_is_logged_and_shown(caplog):
    bench = Bench({"a": 8})
    bench.manager.request("a")
    bench.loader.run()
    outcome = bench.loader.outcomes[0]
    object.__setattr__(outcome.weights, "no_effect", True)
    bench.manager.poll()
    assert "adapter a: has no effect" in caplog.text
    assert bench.manager.show("a").no_effect
