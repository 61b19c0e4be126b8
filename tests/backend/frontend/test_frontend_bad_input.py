# SPDX-License-Identifier: Apache-2.0
"""Every mistake of a client that can be seen without the engine, and the words it gets for it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.errors import ErrorCode, MultiloraError

CHAT = json.dumps([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("[]", "must be a list of one or more messages, got []"),
        ('{"role": "user"}', "must be a list of one or more messages, got {'role'"),
        ('["hi"]', "message 0 must be an object with role and content, got 'hi'"),
        ('[{"content": "a"}]', "message 0: role must be a non-empty string, got None"),
        ('[{"role": 5, "content": "a"}]', "message 0: role must be a non-empty string, got 5"),
        ('[{"role": "user"}]', "message 0: content must be a string or a list of text parts, got None"),
        ('[{"role": "user", "content": [5]}]', "message 0: a content part must be"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "message 0: a content part must be"),
        ('[{"role": "user", "content": "a"', "is not JSON: Expecting ',' delimiter at line 1 column 33"),
        ('[{"role": "user", "content": "\\ud83d"}]', "has a lone UTF-16 surrogate"),
        ('[{"role": "user", "role": "bot", "content": ""}]', "has the key 'role' twice with different values"),
        ("[" * 100_000, "must have at most 2000 bytes, got 100000"),
        ("", "is not JSON"),
    ],
)
def test_bad_messages(parse, refused, messages: str, message: str) -> None:
    assert refused(lambda: parse(messages=messages)).startswith(f"messages: {message}")


def test_unsupported_message_content(parse, refused) -> None:
    image = json.dumps([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    message = "messages: message 0: content of type 'image_url' is not supported"
    assert refused(lambda: parse(messages=image), ErrorCode.UNSUPPORTED) == message


BAD_TENSORS = [
    ({}, "text_input: is required (or messages, for a chat)"),
    ({"text_input": "x", "messages": CHAT}, "messages: must not be sent together with text_input"),
    ({"text_input": ""}, "text_input: is empty: a prompt needs at least one token"),
    ({"text_input": b"ab\xff"}, "text_input: is not UTF-8: byte 0xff at position 2"),
    ({"text_input": "x" * 2001}, "text_input: must have at most 2000 bytes, got 2001"),
    ({"text_input": "x" * 10**7}, "text_input: must have at most 2000 bytes, got 10000000"),
    (
        {"text_input": "x" * 1900},
        "text_input: must have at most 63 tokens (max_model_len less one to generate), got a text of 1900 characters",
    ),
    ({"text_input": "x" * 63}, "text_input: must have at most 63 tokens (max_model_len less one to generate), got 64"),
    (
        {"text_input": np.array([b"a", b"b"], dtype=object)},
        "text_input: must be a STRING tensor of shape [1], got STRING of shape [2]",
    ),
    (
        {"text_input": np.array([[b"a"]], dtype=object)},
        "text_input: must be a STRING tensor of shape [1], got STRING of shape [1, 1]",
    ),
    ({"text_input": np.array([5])}, "text_input: must be a STRING tensor of shape [1], got INT64 of shape [1]"),
    (
        {"text_input": np.array([None], dtype=object)},
        "text_input: must be a STRING tensor, got an element of type NoneType",
    ),
    ({"text_input": np.array(["\ud800"], dtype=object)}, "text_input: has a lone UTF-16 surrogate"),
    (
        {"text_input": "x", "stream": np.array([1])},
        "stream: must be a BOOL tensor of shape [1], got INT64 of shape [1]",
    ),
    (
        {"text_input": "x", "return_logprobs": np.array([], dtype=bool)},
        "return_logprobs: must be a BOOL tensor of shape [1], got BOOL of shape [0]",
    ),
    ({"text_input": "x", "max_tokens": np.array([5])}, "max_tokens: is not an input of this model"),
    ({"text_input": "x", "lora_name": b"\xe4"}, "lora_name: is not UTF-8: byte 0xe4 at position 0"),
    ({"text_input": "x", "lora_name": "a" * 300}, "lora_name: must have at most 256 characters, got 300"),
    ({"text_input": "x", "adapter": "a\0b"}, "adapter: must have printable characters only, got 'a\\x00b'"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD_TENSORS)
def test_bad_tensors(parse, refused, tensors: dict[str, object], message: str) -> None:
    assert refused(lambda: parse(**tensors)).startswith(message)


BAD_OPTIONS = [
    ('{"temperature": 0.5', "sampling_parameters: is not JSON: Expecting ',' delimiter at line 1 column 20"),
    ("{'a': 1}", "sampling_parameters: is not JSON: Expecting property name"),
    ("[1]", "sampling_parameters: must be one JSON object, got [1]"),
    ("null", "sampling_parameters: must be one JSON object, got None"),
    ('"temperature"', "sampling_parameters: must be one JSON object, got 'temperature'"),
    ('{"top_p": NaN}', "sampling_parameters: has the value NaN, which JSON does not know"),
    ('{"top_p": -Infinity}', "sampling_parameters: has the value -Infinity, which JSON does not know"),
    ('{"top_p": 1e999}', "top_p: must be a number in (0, 1], got inf"),
    ('{"top_p": 3.0}', "top_p: must be a number in (0, 1], got 3.0"),
    ('{"top_k": 1, "top_k": 2}', "sampling_parameters: has the key 'top_k' twice with different values"),
    ('{"stop": "\\udc00"}', "sampling_parameters: has a lone UTF-16 surrogate"),
    ('{"tempratur": 1}', "sampling_parameters: unknown key 'tempratur'; did you mean 'temperature'?"),
    ('{"lora_name": 5}', "lora_name: must be a string, got 5"),
    ('{"lora_name": ["a"]}', "lora_name: must be a name, "),
    ('{"tenant": 5}', "tenant: must be a string, got 5"),
    (json.dumps({"tenant": "t" * 129}), "tenant: must have at most 128 characters, got 129"),
    ('{"request_priority": 101}', "request_priority: must be an integer in [-100, 100], got 101"),
    ('{"request_priority": "high"}', "request_priority: must be an integer in [-100, 100], got 'high'"),
    ('{"n": ' + "9" * 900 + "}", "n: must be an integer in [1, 16], got 999"),
    ('{"max_tokens": 60, "min_tokens": 60}', "min_tokens: must be at most 58, which 6 prompt tokens leave of"),
]


@pytest.mark.parametrize(("text", "message"), BAD_OPTIONS)
def test_bad_sampling_parameters(parse, refused, text: str, message: str) -> None:
    assert refused(lambda: parse(text_input="hello", sampling_parameters=text)).startswith(message)


def test_json_made_to_break_a_reader(parse, refused) -> None:
    for depth in (30, 900, 200_000):
        text = '{"stop": ' + "[" * depth + "]" * depth + "}"
        message = refused(lambda text=text: parse(text_input="x", sampling_parameters=text, max_prompt_bytes=10**6))
        assert message.startswith(("stop: each must be a string", "sampling_parameters: is not usable JSON: nested"))
    digits = '{"n": ' + "9" * 9000 + "}"
    message = refused(lambda: parse(text_input="x", sampling_parameters=digits, max_prompt_bytes=10**6))
    assert message.startswith("sampling_parameters: is not usable JSON: a number has too many digits")


@given(text=st.text(max_size=30), field=st.sampled_from(["sampling_parameters", "messages", "lora_name", "text_input"]))
def test_any_text_is_accepted_or_refused_in_words(parse, text: str, field: str) -> None:
    given = {field: text} if field in ("messages", "text_input") else {"text_input": "x", field: text}
    try:
        request = parse(**given)
    except MultiloraError as error:
        assert ":" in error.message  # noqa: PT017
    else:
        assert request.prompt_token_ids


@pytest.mark.parametrize("name", ["image", "embedding_request"])
def test_inputs_of_vllm_backend_that_we_lack(parse, refused, name: str) -> None:
    message = refused(lambda: parse(text_input="x", **{name: "eA=="}), ErrorCode.UNSUPPORTED)
    assert message == f"{name}: is not supported: this model takes and gives text"
