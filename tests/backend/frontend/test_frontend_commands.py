# SPDX-License-Identifier: Apache-2.0
"""A request to multilora_adapters: two spellings of one command, and one clear error for everything else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.config import Config
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.commands import ACTIONS, MAX_TENANTS, parse
from multilora_backend.protocol import AdapterArguments, AdapterCommand, encoder, frontend_decoder

CONFIG = Config(tenant_header="Tenant-Id")


def as_tensor(value: object) -> dict[str, np.ndarray]:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return {"request": np.array([text], dtype=object)}


def read(values: dict[str, object]) -> AdapterCommand:
    """By tensor and, where parameters can say it, by parameters: both must mean the same."""
    command = parse(7, as_tensor(values), {}, CONFIG)
    if not any(isinstance(value, list) or value is None for value in values.values()):
        assert parse(7, {}, values, CONFIG) == command
    return command


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({"action": "list"}, {}),
        ({"action": "list", "prefix": "a", "state": "failed", "offset": "3", "limit": 5}, {"offset": 3, "limit": 5}),
        ({"action": "show", "name": "a@123456"}, {}),
        ({"action": "load", "name": "a"}, {}),
        ({"action": "load", "name": "a", "source": "s3://b/c", "pinned": "true", "tenants": "x, y,,x"}, None),
        ({"action": "load", "name": "a", "tenants": ["x", "y"], "version": None}, {"tenants": ("x", "y")}),
        ({"action": "unload", "name": "a", "wait": "false", "timeout_s": "2.5"}, {"wait": False, "timeout_s": 2.5}),
        ({"action": "alias", "alias": "b", "target": "a"}, {}),
        ({"action": "unalias", "alias": "b"}, {}),
    ],
)
def test_commands(values: dict[str, object], arguments: dict[str, object] | None):
    command = read(values)
    if arguments is None:
        arguments = {"source": "s3://b/c", "pinned": True, "tenants": ("x", "y")}
    given_as_they_are = {k: v for k, v in values.items() if k != "action" and v is not None}
    assert command.action == values["action"]
    assert command.arguments == AdapterArguments(**{**given_as_they_are, **arguments})
    assert frontend_decoder.decode(encoder.encode(command)) == command


def test_what_is_left_out_waits_and_says_nothing_of_the_rest():
    arguments = read({"action": "load", "name": "a"}).arguments
    assert (arguments.wait, arguments.timeout_s, arguments.pinned, arguments.source) == (True, 60.0, False, "")


def test_the_token_is_no_argument():
    command = read({"action": "list", "token": "secret"})
    assert (command.token, command.arguments) == ("secret", AdapterArguments())


def test_headers_that_are_forwarded_and_tritons_own_parameters_are_no_arguments():
    parameters = {"action": "list", "tenant-id": "x", "X-Request-Id": "1", "triton_grpc_error": True, "timeout": 3}
    assert parse(1, {}, parameters, CONFIG) == AdapterCommand(1, "list")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "action: must be one of load, unload, list, show, pin, unpin, alias, unalias, preload, got None"),
        ({"action": ["load"]}, "action: must be one of"),
        ({"action": "reload", "name": "a"}, "action: must be one of"),
        ({"action": "load"}, "name: is required by load"),
        ({"action": "load", "name": ""}, "name: must not be empty"),
        ({"action": "load", "name": None}, "name: is required by load"),
        ({"action": "load", "name": "a/b"}, "name: must be the name of an adapter, not a path, got 'a/b'"),
        ({"action": "load", "name": "..\\a"}, "name: must be the name of an adapter, not a path"),
        ({"action": "show", "name": "a\nb"}, "name: must have printable characters only"),
        ({"action": "show", "name": "x" * 300}, "name: must have at most 256 characters, got 300"),
        ({"action": "show", "name": 3}, "name: must be a string, got 3"),
        ({"action": "unload", "name": "a:0.5"}, "name: must be the name of one adapter, got 'a:0.5'"),
        ({"action": "pin", "name": {"a": 1}}, "name: must be a string, got {'a': 1}"),
        ({"action": "alias", "alias": "a,b", "target": "c"}, "alias: must be the name of one adapter, got 'a,b'"),
        ({"action": "alias", "alias": "a", "target": "b:1"}, "target: must be the name of one adapter, got 'b:1'"),
        ({"action": "alias", "alias": "a"}, "target: is required by alias"),
        ({"action": "alias", "name": "a", "target": "b"}, "alias: unknown argument 'name'; known are alias, target"),
        ({"action": "load", "name": "a", "sorce": "x"}, "load: unknown argument 'sorce', did you mean source?"),
        ({"action": "show", "name": "a", "source": "/etc"}, "show: unknown argument 'source'"),
        ({"action": "load", "name": "a", "pinned": "maybe"}, "pinned: must be true or false, got 'maybe'"),
        ({"action": "load", "name": "a", "tenants": {"x": 1}}, "tenants: must be a list of tenants"),
        ({"action": "load", "name": "a", "tenants": [3]}, "tenants: must be a string, got 3"),
        ({"action": "load", "name": "a", "tenants": ["x"] * (MAX_TENANTS + 1)}, "tenants: must have at most 1000"),
        ({"action": "pin", "name": "a", "timeout_s": -1}, "timeout_s: must be a number in [0, 3600], got -1"),
        ({"action": "pin", "name": "a", "timeout_s": "nan"}, "timeout_s: must be a number"),
        ({"action": "list", "limit": 0}, "limit: must be an integer in [1, 1000], got 0"),
        (
            {"action": "list", "state": "hot"},
            "state: must be one of cold, loading, active, evicting, failed, got",
        ),
        ({"action": "list", "token": 7}, "token: must be a string"),
        ([1], "request: must be one JSON object, got [1]"),
        (b"{", "request: is not JSON"),
        (b'{"action": "list", "action": "show"}', "request: has the key 'action' twice with different values"),
        (b"\xff", "request: is not UTF-8"),
        (b" " * 70_000, "request: must have at most 65536 bytes"),
    ],
)
def test_what_is_wrong_is_named(values: object, message: str, refused):
    assert refused(lambda: parse(1, as_tensor(values), {}, CONFIG)).startswith(message)


def test_a_token_is_never_repeated(refused):
    for token in ("s3cret" * 999, "s3cret\n", ["s3cret"]):
        message = refused(lambda token=token: parse(1, as_tensor({"action": "list", "token": token}), {}, CONFIG))
        assert "s3cret" not in message


def test_other_tensors_and_mixtures_are_refused(refused):
    text = {"text_input": np.array([b"x"], dtype=object)}
    assert refused(lambda: parse(1, text, {"action": "list"}, CONFIG)).startswith("text_input: is not an input")
    both = refused(lambda: parse(1, as_tensor({"action": "list"}), {"action": "list"}, CONFIG))
    assert both.startswith("request: must not be sent together with request parameters")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["action", "name", "source", "alias", "target", "tenants", "wait", "timeout_s", "limit", "x"])


@given(st.dictionaries(names, json_values | st.sampled_from([*ACTIONS]), max_size=5))
def test_any_object_is_a_command_or_one_error(values: dict[str, object]):
    error = None
    try:
        command = parse(1, as_tensor(values), {}, CONFIG)
    except MultiloraError as caught:
        error = caught
    if error is None:
        assert frontend_decoder.decode(encoder.encode(command)) == command
    else:
        assert error.code is ErrorCode.INVALID_ARG
        assert len(error.message) < 350
