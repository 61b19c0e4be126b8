# SPDX-License-Identifier: Apache-2.0
"""Compositions come with a request and go with the last: what they are made of, and what becomes of them meanwhile."""

from __future__ import annotations

from decimal import Decimal

import pytest

from adapter_bench import Bench, version_of
from composition_bench import active, expected, is_there
from multilora_backend.adapters import compositions
from multilora_backend.adapters.composing import composed_version
from multilora_backend.adapters.state import AdapterState
from multilora_backend.adapters.statefile import StateFile
from multilora_backend.core import COMPOSED, adapter_name
from multilora_backend.errors import ErrorCode, MultiloraError

ACTIVE, COLD, FAILED = AdapterState.ACTIVE, AdapterState.COLD, AdapterState.FAILED


def test_it_is_one_adapter_of_the_sum_of_ranks():
    bench = Bench({"a": 3, "b": 8}, watched=True)
    key = active(bench, "b:0.3,a:0.7")
    record = bench.manager.records[key]
    assert (record.rank, record.title) == (11, "a:0.7,b:0.3")
    assert is_there(bench, key, expected(a=(3, "0.7"), b=(8, "0.3")))
    assert bench.manager.names() == ["a", "b"], "it is no configured adapter"
    assert adapter_name(key) == adapter_name("a:0.7,b:0.3") == COMPOSED
    assert record.holds == 1
    assert [bench.manager.records[name].holds for name in "ab"] == [1, 1]
    bench.manager.drop(key)
    assert [bench.manager.records[name].holds for name in "ab"] == [0, 0]


def test_equal_sums_are_one_and_trivial_ones_are_none():
    bench = Bench({"a": 3, "b": 8}, watched=True)
    manager = bench.manager
    manager.alias("prod", "a")
    key = manager.resolve("a:0.7,b:0.3")
    for same in ("b:0.3,a:0.7", "prod:0.7,b:0.3", "a:0.4,b:0.3,prod:0.3", "a:0.70,b:3e-1,prod:0"):
        assert manager.resolve(same) == key
    assert manager.resolve("a:0.7,b:0.4") != key
    assert manager.resolve("prod:1") == manager.resolve("prod:0.5,a:0.5") == manager.resolve("a,b:0") == "a"
    assert manager.resolve("a:0") == manager.resolve("a:1,prod:-1") == ""
    with pytest.raises(MultiloraError, match="LoRA c is not supported"):
        manager.resolve("a:1,c:0")


def test_every_part_has_its_own_tenants():
    bench = Bench({"a": 3, "b": 8}, watched=True)
    bench.reconcile(b=bench.entry("b", tenants=("acme",)))
    assert bench.manager.resolve("a:0.5,b:0.5", "acme")
    with pytest.raises(MultiloraError, match="LoRA b is not for tenant 'rival'"):
        bench.manager.resolve("a:0.5,b:0.5", "rival")


def test_too_many_ranks_are_refused_with_the_limit():
    bench = Bench({"a": 8, "b": 24}, ranks=24, watched=True)
    bench.manager.check_all()
    bench.land()
    with pytest.raises(MultiloraError, match=r"a:0.5,b:1: its parts have the ranks 8 \+ 24, and .* hold rank 24") as e:
        bench.manager.resolve("a:0.5,b")
    assert e.value.code is ErrorCode.INVALID_ARG
    fresh = Bench({"a": 8, "b": 24}, ranks=24, watched=True)
    key = fresh.manager.resolve("a:0.5,b")
    fresh.manager.hold(key)
    fresh.manager.request(key)
    assert fresh.land() == [key], "before anything is read it can only be found out then"
    assert "rank 32 needs" in fresh.manager.reason(key)


def test_parts_are_read_once_for_any_number_of_compositions():
    bench = Bench({"a": 3, "b": 4}, ranks=64, watched=True)
    for weight in range(1, 6):
        bench.manager.drop(active(bench, f"a:0.{weight},b:0.5"))
    assert sorted(bench.loader.read) == ["a", "b"]
    assert bench.manager.show("a").version == version_of("a", 3)


def test_their_number_is_bounded(monkeypatch):
    monkeypatch.setattr(compositions, "MAX_COMPOSITIONS", 3)
    bench = Bench({"a": 3}, ranks=64, watched=True)
    held = [active(bench, f"a:{n}") for n in (2, 3)]
    bench.manager.drop(active(bench, "a:4"))
    last = active(bench, "a:5")
    assert sum(bool(record.parts) for record in bench.manager.records.values()) == 3
    assert {*held, last} <= set(bench.manager.records)
    with pytest.raises(MultiloraError, match="lora_name: 3 compositions of adapters are in use already") as error:
        bench.manager.resolve("a:6")
    assert error.value.code is ErrorCode.UNAVAILABLE


def test_what_nobody_uses_and_no_memory_has_is_forgotten():
    bench = Bench({"a": 3, "big": 24}, ranks=24, watched=True, host_bytes=0)
    key = active(bench, "a:2")
    bench.activate("big")
    bench.settle()
    assert key in bench.manager.records, "somebody holds it"
    bench.manager.drop(key)
    bench.settle()
    assert key not in bench.manager.records
    assert not bench.manager.records["a"].wholes


def test_it_is_not_written_to_the_state_file(tmp_path):
    bench = Bench({"a": 3}, watched=True, state=StateFile(tmp_path / "state.json"))
    active(bench, "a:2")
    bench.manager.alias("prod", "a")
    bench.manager.close()
    text = (tmp_path / "state.json").read_text()
    assert "prod" in text
    assert "a:2" not in text
    assert COMPOSED not in text


def test_versions_of_parts_can_be_named():
    bench = Bench({"a": 3, "b": 4}, ranks=64, watched=True)
    bench.activate("a")
    first = version_of("a", 3)
    bench.manager.alias("old", f"a@{first}")
    bench.loader.change("a", 5)
    bench.reconcile()
    bench.settle()
    key = active(bench, f"a@{first[:8]}:0.5,a:0.25")
    parts = [(first, Decimal("0.5")), (version_of("a", 5), Decimal("0.25"))]
    assert bench.manager.records[key].version == composed_version(parts)
    assert bench.manager.resolve("old:0.5,a:0.25") == key
    bench.manager.drop(key)
    bench.settle()
    assert key not in bench.manager.records, "it has a part that was replaced"
