# SPDX-License-Identifier: Apache-2.0
"""What clients may ask for: names, aliases, versions, and who may ask."""

from __future__ import annotations

import pytest

from adapter_bench import Bench, source_of, version_of
from multilora_backend.adapters.entry import AdapterEntry, Origin
from multilora_backend.adapters.registry import Registry, split_version
from multilora_backend.core import adapter_name
from multilora_backend.errors import ErrorCode, MultiloraError


def entry(name: str, **fields) -> AdapterEntry:
    return AdapterEntry(name, source_of(name), **fields)


def test_keys_and_names():
    assert [adapter_name(key) for key in ("", "a", "a@2", "a b@13")] == ["", "a", "a", "a b"]
    assert split_version("a@abcdef0", "x") == ("a", "abcdef0")
    for asked in ("a@", "a@2", "a@ABCDEF", "a@abcdef@abcdef", "a@abcdeg1"):
        with pytest.raises(MultiloraError, match=r"^x: the version in .* must be 6 or more hexadecimal digits$"):
            split_version(asked, "x")


def test_unknown_names_in_the_words_of_vllm_backend():
    bench = Bench({"doll": 8, "sheep": 8})
    with pytest.raises(MultiloraError, match=r"^LoRA x is not supported, we currently support \['doll', 'sheep'\]$"):
        bench.manager.resolve("x")
    with pytest.raises(MultiloraError, match="LoRA x is not supported"):
        bench.manager.request("x")
    bench = Bench({f"a{i}": 8 for i in range(60)})
    with pytest.raises(MultiloraError, match=r"'a49'\] \.\.\. and 10 more$"):
        bench.manager.resolve("x" * 500)


def test_who_may_use_an_adapter_and_who_may_know_of_it():
    bench = Bench({"open": 8})
    bench.reconcile(gold=AdapterEntry("gold", source_of("open"), tenants=("acme", "beta-*")))
    manager = bench.manager
    assert manager.resolve("gold", "acme") == manager.resolve("gold", "beta-7") == "gold"
    with pytest.raises(MultiloraError, match=r"^LoRA gold is not for tenant 'acm'$") as error:
        manager.resolve("gold", "acm")
    assert error.value.code is ErrorCode.INVALID_ARG
    with pytest.raises(MultiloraError, match="not for requests without a tenant"):
        manager.resolve("gold")
    manager.alias("prod", "gold")
    with pytest.raises(MultiloraError, match="not for"):
        manager.resolve("prod", "acm")
    with pytest.raises(MultiloraError, match=r"support \['open'\]$"):
        manager.resolve("silver")


def test_aliases_move_at_once_and_lead_to_aliases():
    bench = Bench({"a": 3, "b": 5})
    manager = bench.manager
    manager.alias("prod", "a")
    manager.alias("prod", "a")
    manager.alias("shop", "prod")
    assert manager.resolve("shop") == "a"
    manager.alias("prod", "b")
    assert manager.resolve("shop") == manager.resolve("prod") == "b"
    assert manager.show("shop").aliases == ["prod", "shop"]
    with pytest.raises(MultiloraError, match="'b' is what 'prod', 'shop' stands for"):
        manager.unload("b")
    with pytest.raises(MultiloraError, match="'shop' is an alias of 'prod', not an adapter"):
        manager.unload("shop")
    manager.unalias("shop")
    manager.unalias("shop")
    manager.unalias("prod")
    manager.unload("b")
    with pytest.raises(MultiloraError, match="LoRA prod is not supported"):
        manager.resolve("prod")


@pytest.mark.parametrize(
    ("alias", "target", "problem"),
    [
        ("a", "b", "'a' is the name of an adapter"),
        ("one", "one", "leads back"),
        ("one", "three", "'three' leads back to the alias 'one'"),
        ("x", "nothing", "'nothing' is no adapter"),
        ("x", "one@abcdef", "'one' is no adapter"),
        ("x", "a@abcdef", "is no version that is known; known: none; its current content has not been read"),
        ("x/y", "a", "must not contain"),
        ("x@1", "a", "must not contain"),
        ("", "a", "must have 1 to 128 characters"),
        ("__base__", "a", "is reserved"),
    ],
)
def test_aliases_that_are_refused_change_nothing(alias, target, problem):
    bench = Bench({"a": 3, "b": 5})
    manager = bench.manager
    for one, other in (("one", "a"), ("two", "one"), ("three", "two")):
        manager.alias(one, other)
    before = dict(manager.registry.aliases)
    with pytest.raises(MultiloraError, match=problem):
        manager.alias(alias, target)
    assert manager.registry.aliases == before
    assert [manager.resolve(name) for name in ("one", "two", "three")] == ["a"] * 3


def test_versions_are_addressed_by_their_beginning():
    bench = Bench({"a": 3}, watched=True)
    manager = bench.manager
    old, new = version_of("a", 3), version_of("a", 5)
    with pytest.raises(MultiloraError, match="not been read yet"):
        manager.resolve(f"a@{old}")
    bench.activate("a")
    manager.alias("blue", f"a@{old[:8]}")
    assert manager.registry.aliases["blue"] == f"a@{old}"
    bench.loader.change("a", 5)
    bench.reconcile()
    bench.settle()
    manager.alias("green", f"a@{new}")
    asked = ("a", "blue", "green", f"a@{old[:6]}", f"a@{new[:6]}")
    assert [manager.resolve(name) for name in asked] == ["a@2", "a", "a@2", "a", "a@2"]
    assert manager.show("blue").current is False
    for command in (manager.pin, manager.unpin, manager.preload):
        with pytest.raises(MultiloraError, match="'blue' is not the current revision of 'a'"):
            command("blue")
    with pytest.raises(MultiloraError, match=rf"known: .*{old}"):
        manager.resolve("a@ffffff")
    # Nothing but the alias keeps the old revision.
    manager.alias("blue", f"a@{new}")
    assert manager.records.keys() == {"a@2"}
    manager.unalias("blue")
    manager.unalias("green")
    assert manager.records["a@2"].holds == 0


def test_a_beginning_of_several_versions():
    bench = Bench({"a": 3}, watched=True)
    manager = bench.manager
    bench.activate("a")
    manager.hold("a")
    bench.loader.change("a", 5)
    bench.reconcile()
    bench.settle()
    for record in manager.records.values():
        manager._life.books.set_version(record, "abcdef" + record.version)
    with pytest.raises(MultiloraError, match="is the beginning of several versions"):
        manager.resolve("a@abcdef")


def test_two_revisions_of_one_version_are_the_current_one():
    bench = Bench({"a": 3}, watched=True, more_folders={"b": 3})
    manager = bench.manager
    bench.activate("a")
    manager.hold("a")
    for rank in (5, 3):
        bench.loader.change("a", rank)
        bench.reconcile()
        bench.settle()
    assert manager.resolve(f"a@{version_of('a', 3)}") == manager.resolve("a") == "a@3"


def test_an_alias_of_a_name_that_has_gone_says_so():
    bench = Bench({"a": 3, "b": 5})
    manager = bench.manager
    bench.activate("a")
    manager.alias("prod", "a")
    manager.alias("blue", f"a@{version_of('a', 3)}")
    bench.reconcile(a=None)
    assert manager.records.keys() == {"b"}
    for alias in ("prod", "blue"):
        with pytest.raises(MultiloraError, match=rf"^LoRA {alias} is not supported, we currently support \['b'\]$"):
            manager.resolve(alias)
    bench.reconcile(a=bench.entry("a"))
    assert manager.resolve("prod") == "a"


def test_a_name_is_taken_by_who_came_first():
    registry = Registry()
    registry.put(entry("a"))
    registry.alias("x", "a")
    with pytest.raises(MultiloraError, match="'x' is an alias of 'a'; unalias it first"):
        registry.put(entry("x"))
    with pytest.raises(MultiloraError, match="'a' is taken: it comes from the configured adapters"):
        registry.put(entry("a", origin=Origin.ADMIN))
    registry.put(entry("b", origin=Origin.ADMIN))
    with pytest.raises(MultiloraError, match="'b' is taken: it comes from a load command"):
        registry.put(entry("b"))
    for name in ("../a", "a@b", "a:b", "a,b", "", " a", "a\n", "x" * 129, "__base__"):
        with pytest.raises(MultiloraError, match=r"^name: "):
            registry.put(entry(name))
    assert [each.name for each in registry.entries()] == ["a", "b"]
