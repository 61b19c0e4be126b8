# SPDX-License-Identifier: Apache-2.0
"""How clients write several adapters with weights, and the one spelling that is kept."""

from __future__ import annotations

import json
from contextlib import suppress
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.adapters.catalogue import name_problem
from multilora_backend.composition import (
    MAX_DECIMALS,
    MAX_LENGTH,
    MAX_PARTS,
    MAX_WEIGHT,
    is_composed,
    parse,
    parse_json,
    plain,
    spelled,
)
from multilora_backend.errors import MultiloraError

names = st.text(min_size=1, max_size=20).filter(lambda name: not name_problem(name))
weights = st.integers(-MAX_WEIGHT * 10**MAX_DECIMALS // MAX_PARTS, MAX_WEIGHT * 10**MAX_DECIMALS // MAX_PARTS).map(
    lambda n: Decimal(n).scaleb(-MAX_DECIMALS)
)
pairs = st.lists(st.tuples(names, weights), min_size=1, max_size=MAX_PARTS)


def total(given) -> dict[str, Decimal]:
    sums: dict[str, Decimal] = {}
    for name, weight in given:
        sums[name] = sums.get(name, Decimal(0)) + weight
    return sums


@given(pairs, st.randoms())
def test_every_spelling_gives_one(said, random):
    text = ",".join(f" {name} : {weight:e}" for name, weight in said)
    parts = parse("lora_name", text)
    assert {part.name: part.weight for part in parts} == total(said)
    shuffled = random.sample(said, len(said))
    listed = [{"name": name, "weight": float(weight)} for name, weight in shuffled]
    assert parse_json("lora_name", json.loads(json.dumps(listed))) == parts
    assert parse_json("lora_name", {part.name: float(part.weight) for part in parts}) == parts
    once = spelled(parts)
    assert spelled(parse("lora_name", once)) == once
    assert parse("lora_name", once) == parts


@given(weights)
def test_equal_weights_are_written_alike(weight):
    for other in (weight * Decimal("1.000"), weight.normalize(), Decimal(f"{weight:e}")):
        assert plain(other) == plain(weight)
    assert Decimal(plain(weight)) == weight
    assert "e" not in plain(weight).lower()


@given(st.text(max_size=60))
def test_whatever_comes_is_read_or_refused(text):
    try:
        parts = parse("lora_name", text)
    except MultiloraError:
        return
    assert 1 <= len(parts) <= MAX_PARTS
    assert spelled(parse("lora_name", spelled(parts))) == spelled(parts)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "weight", "x"]), inner),
    max_leaves=8,
)


@given(json_values)
def test_whatever_json_comes_is_read_or_refused(value):
    with suppress(MultiloraError):
        assert parse_json("lora_name", value)


def test_names_of_adapters_are_no_compositions():
    for name in ("a", "a.b-c_d", "{x}", "[a]", "a b", "0.5", "name@5f0c8e"):
        assert not is_composed(name)
    for name in ("a:b", "a,b"):
        assert name_problem(name)


def test_what_is_left_out_is_one():
    assert spelled(parse("lora_name", "b,a")) == "a:1,b:1"
    assert spelled(parse("lora_name", "a:1.0")) == "a"
    assert spelled(parse("lora_name", "a:0.1,b:1,a:0.2")) == "a:0.3,b:1"
    assert spelled(parse_json("lora_name", [{"name": "a"}, {"name": "b", "weight": -0.5}])) == "a:1,b:-0.5"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a:nan", "the weight of 'a' must be a number, got 'nan'"),
        ("a:inf", "must be a number"),
        ("a:", "must be a number, got ''"),
        ("a:1_0", "must be a number"),
        ("a:٣", "must be a number"),
        ("a:0.5:2", "must be a number, got '0.5:2'"),
        ("a:1e3000", "must be a number"),
        ("a:1e999", f"the weight of 'a' must be within {MAX_WEIGHT}, got 1E+999"),
        ("a:-1000.1", f"must be within {MAX_WEIGHT}"),
        ("a:600,a:600", f"must be within {MAX_WEIGHT}, got 1200"),
        ("a:0.1234567", f"must have at most {MAX_DECIMALS} digits after the point, got 0.1234567"),
        ("a:1e-999", f"must have at most {MAX_DECIMALS} digits after the point"),
        (":1", "names an adapter by nothing"),
        ("a:1,", "names an adapter by nothing"),
        (",".join(f"a{i}:1" for i in range(MAX_PARTS + 1)), f"must name 1 to {MAX_PARTS} adapters, got 9"),
        ("a" * MAX_LENGTH + ":1", f"must have at most {MAX_LENGTH} characters"),
    ],
)
def test_refused_texts(text: str, problem: str):
    with pytest.raises(MultiloraError) as error:
        parse("lora_name", text)
    assert error.value.message.startswith("lora_name: ")
    assert problem in error.value.message


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({}, "must name 1 to"),
        ([], "must name 1 to"),
        ({"a": "0.7"}, "the weight of 'a' must be a number, got '0.7'"),
        ({"a": True}, "must be a number"),
        ({"a": float("inf")}, "must be a number, got 'inf'"),
        ([{"name": "a", "scale": 1}], "must be a name"),
        (["a"], "must be a name"),
        ({"": 1}, "names an adapter by nothing"),
        ({"a": 10**400}, "must be a number"),
    ],
)
def test_refused_json(value, problem: str):
    with pytest.raises(MultiloraError, match=problem):
        parse_json("lora_name", value)
