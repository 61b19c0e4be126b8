# SPDX-License-Identifier: Apache-2.0
"""Tenant and priority: from the client, or from headers that a gateway sets and no client can contradict."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from multilora_backend.config import Config
from multilora_backend.errors import MultiloraError
from multilora_backend.frontend.request import RawRequest
from multilora_backend.frontend.request import parse as parse_request
from multilora_backend.frontend.tokenizers import Tokenizers

BOTH = Config(tenant_header="Tenant-Id", priority_header="X-Priority")


@pytest.fixture
def routed(make_card, tokenizers) -> Callable[..., tuple[str, int]]:
    """routed(parameters, options, config): tenant and priority of a request; `options` is the sampling JSON."""

    def run(parameters: dict | None = None, options: dict | None = None, config: Config = BOTH) -> tuple[str, int]:
        tensors = {"text_input": np.array([b"x"], dtype=object)}
        if options is not None:
            tensors["sampling_parameters"] = np.array([json.dumps(options).encode()], dtype=object)
        known = Tokenizers(tokenizers["byte_level"])
        request, _ = parse_request(RawRequest(tensors, parameters or {}), make_card(), config, known)
        return request.tenant, request.priority

    return run


def test_without_headers_the_client_says_it(routed):
    plain = Config()
    assert routed({"tenant": "a", "request_priority": "3"}, config=plain) == ("a", 3)
    assert routed({}, {"tenant": "b", "request_priority": -1}, plain) == ("b", -1)
    assert routed({"tenant": "a"}, {"tenant": "b"}, plain) == ("a", 0), "the parameter wins"
    assert routed({"X-Tenant": "a"}, config=plain) == ("", 0), "some header that the operator forwards"


@pytest.mark.parametrize("spelled", ["Tenant-Id", "tenant-id", "TENANT-ID"])
def test_headers_count_in_any_case(routed, spelled: str):
    assert routed({spelled: "acme", "x-priority": "-5"}) == ("acme", -5)
    assert routed({spelled: "acme", "temperature": 0}) == ("acme", 0), "and they are no sampling parameters"


def test_without_the_header_there_is_no_tenant(routed):
    assert routed() == ("", 0)


@pytest.mark.parametrize("where", ["parameters", "options"])
@pytest.mark.parametrize(("key", "header"), [("tenant", "Tenant-Id"), ("request_priority", "X-Priority")])
def test_a_client_cannot_say_what_headers_govern(routed, refused, where: str, key: str, header: str):
    message = refused(lambda: routed(**{where: {key: "1"}}))
    assert message == f"{key}: is set by the header {header} on this server, and must not be sent"
    one = Config(**{f"{'tenant' if key == 'tenant' else 'priority'}_header": header})
    with pytest.raises(MultiloraError, match="must not be sent"):
        routed({header: "1", key: "1"}, config=one)


def test_a_parameter_that_imitates_the_header_is_found_out(routed, refused):
    message = refused(lambda: routed({"Tenant-Id": "rival", "tenant-id": "acme"}))
    assert message == "tenant: the header Tenant-Id came with different values"
    assert routed({"Tenant-Id": "acme", "tenant-id": "acme"}) == ("acme", 0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tenant-id": "x" * 129}, "tenant: must have at most 128 characters"),
        ({"tenant-id": 3}, "tenant: must be a string"),
        ({"tenant-id": "a\tb"}, "tenant: must have printable characters only"),
        ({"x-priority": "high"}, "request_priority: must be an integer in [-100, 100], got 'high'"),
        ({"x-priority": "101"}, "request_priority: must be an integer in [-100, 100]"),
    ],
)
def test_bad_headers_are_named(routed, refused, parameters: dict, message: str):
    assert refused(lambda: routed(parameters)).startswith(message)


@pytest.mark.parametrize("name", ["tenant_header", "priority_header"])
@pytest.mark.parametrize("value", ["a b", "x:y", "1x", "(.*)", "x" * 65])
def test_only_header_names_can_be_configured(name: str, value: str):
    with pytest.raises(MultiloraError, match=f"^{name}: must be the name of an HTTP header"):
        Config(**{name: value})


SUM = "a:0.7,b:0.3"


@pytest.mark.parametrize(
    "said",
    [SUM, "b:0.3, a:7e-1", '{"b": 0.3, "a": 0.7}', '[{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.3}]'],
)
def test_sums_of_adapters_have_one_spelling(parse, said: str):
    assert parse(text_input="x", lora_name=said).adapter == SUM
    assert parse({"adapter": said}, text_input="x").adapter == SUM
    assert parse(text_input="x", sampling_parameters={"lora_name": said}).adapter == SUM


def test_sums_of_adapters_as_json(parse):
    for said in ({"b": 0.3, "a": 0.7}, [{"name": "b", "weight": 0.3}, {"name": "a", "weight": 0.7}]):
        assert parse(text_input="x", sampling_parameters={"lora_name": said}).adapter == SUM
    assert parse(text_input="x", sampling_parameters={"lora_name": {"a@5f0c8e": 1}}).adapter == "a@5f0c8e"
    assert parse(text_input="x", sampling_parameters={"lora_name": SUM, "adapter": {"b": 0.3, "a": 0.7}}).adapter == SUM


def test_names_that_look_like_json_are_names(parse):
    assert parse(text_input="x", lora_name="{x}").adapter == "{x}"
    assert parse(text_input="x", lora_name="[a]").adapter == "[a]"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("a:x,b:1", "lora_name: the weight of 'a' must be a number, got 'x'"),
        ("../a:1,b:1", "lora_name: must be the name of an adapter, not a path, got '../a'"),
        ("a\tb:0.5", "lora_name: must have printable characters only"),
        (f"{'x' * 257}:0.5", "lora_name: must have at most 256 characters, got 257"),
        ("a:0.5,b:", "lora_name: the weight of 'b' must be a number, got ''"),
        (",".join(f"{i}{'x' * 240}:0.5" for i in range(8)) + " " * 200, "lora_name: must have at most 2048"),
        ('{"a": 0.7, "a": 0.8}', "lora_name: has the key 'a' twice with different values"),
        ('{"a": NaN, "b": 1}', "lora_name: has the value NaN, which JSON does not know"),
        ('{"a": 0.7', "lora_name: is not JSON"),
        ('["a", "b"]', "lora_name: must be a name, "),
    ],
)
def test_bad_sums_are_named(parse, refused, said: str, message: str):
    assert refused(lambda: parse(text_input="x", lora_name=said)).startswith(message)
