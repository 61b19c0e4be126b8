# SPDX-License-Identifier: Apache-2.0
"""The tenants file: what it grants, and that each mistake is named with its place."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.scheduling.tenants import PRIORITY_STEPS, SlaClass, Tenant, Tenants, class_of

FILE = """
classes:
  interactive: {weight: 8, deadline_s: 1.5}
  batch: {weight: 0.25}
default: {class: batch, max_waiting: 100}
tenants:
  acme: {class: interactive, weight: 2, adapters: ["acme-*", shared], max_running: 64, tokens_per_s: 4000}
  plain:
"""


def test_what_a_file_grants(tmp_path: Path):
    path = tmp_path / "tenants.yaml"
    path.write_text(FILE)
    tenants = Tenants.read(str(path))
    acme = tenants.get("acme")
    assert acme.sla == SlaClass("interactive", 8, 1.5)
    assert (acme.name, acme.weight, acme.max_running, acme.tokens_per_s, acme.max_waiting) == ("acme", 2, 64, 4000, 0)
    assert [acme.may_use(name) for name in ("acme-1", "shared", "other", "")] == [True, True, False, True]
    assert tenants.get("plain") == Tenant("plain")
    assert tenants.get("nobody").sla.name == "batch"
    assert tenants.get("nobody").max_waiting == 100
    assert tenants.get("nobody") != tenants.get("somebody"), "each of those that are not named is a tenant of its own"


@pytest.mark.parametrize("text", [None, "", "# nothing\n", "tenants:\n"])
def test_no_file_and_an_empty_one_are_the_same(tmp_path: Path, text: str | None):
    path = tmp_path / "tenants.yaml"
    if text is not None:
        path.write_text(text)
    assert Tenants.read(str(path) if text is not None else "").get("anybody") == Tenant("anybody")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "the file: must map names to settings"),
        ("a: b: c", "mapping values are not allowed"),
        ("tenant: {}", "the file: unknown key 'tenant'; known are classes, default, tenants"),
        ("tenants: {a: {}, a: {}}", "'a' occurs twice"),
        ("tenants: [a]", "tenants: must map"),
        ("tenants: {a: {wieght: 1}}", "tenants.a: unknown key 'wieght'"),
        ("tenants: {a: {name: b}}", "tenants.a: unknown key 'name'"),
        ("tenants: {a: {class: gold}}", "tenants.a.class: must be one of standard, got 'gold'"),
        ("tenants: {a: {class: [gold]}}", "tenants.a.class: must be one of"),
        ("tenants: {a: {weight: 0}}", "tenants.a.weight: must be from 1e-6 to 1e6, got 0"),
        ("tenants: {a: {weight: .nan}}", "tenants.a.weight: must be from"),
        ("tenants: {a: {weight: true}}", "tenants.a.weight: must be a number, got True"),
        ("tenants: {a: {max_running: 1.5}}", "tenants.a.max_running: must be a whole number, got 1.5"),
        ("tenants: {a: {max_running: -1}}", "tenants.a.max_running: must be 0 or more"),
        ("tenants: {a: {tokens_per_s: .inf}}", "tenants.a.tokens_per_s: must be 0 or more, got inf"),
        ("tenants: {a: {adapters: acme}}", "tenants.a.adapters: must be a list of patterns"),
        ("classes: {a: {deadline_s: soon}}", "classes.a.deadline_s: must be a number, got 'soon'"),
        ("classes: {gold@+1: {}}", "classes.gold@+1: a name has no '@'"),
        ("classes: {1: {}}", "classes: must map names"),
        ("default: {class: gone}", "default.class"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    with pytest.raises(MultiloraError) as caught:
        Tenants.read(str(path))
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert problem in caught.value.message
    assert caught.value.message.startswith(f"tenants: {path}")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(MultiloraError, match="No such file"):
        Tenants.read(str(tmp_path / "none.yaml"))


def test_priorities_are_classes_with_bounded_weights():
    tenant = Tenant("t", sla=SlaClass("gold", 2.0), max_priority=1)
    assert class_of(tenant, 0) == SlaClass("gold", 2.0)
    assert class_of(tenant, 1) == class_of(tenant, 100) == SlaClass("gold@+1", 8.0)
    assert class_of(tenant, -1).weight == 0.5
    assert class_of(tenant, -100) == class_of(tenant, -PRIORITY_STEPS)
    assert class_of(Tenant(), 100).weight == 4.0**PRIORITY_STEPS
    assert math.isinf(class_of(tenant, 1).deadline_s)
