# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear error that names field and limit, with the right code, and nobody else notices."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from tiny.tasks import ADAPTERS, TASKS, held_out_words
from triton_calls import grpc_call, http_post

GREEDY = {"temperature": 0.0, "max_tokens": 32}
SUPPORTED = f"LoRA nobody is not supported, we currently support {sorted(ADAPTERS)}"

# (tensors, parameters, gRPC status, what the message says).
# Over HTTP this Triton answers 400 for every error of a model.
BAD = {
    "unknown adapter": ({"lora_name": "nobody"}, {}, "INVALID_ARGUMENT", SUPPORTED),
    "adapter path": ({"lora_name": "../upper"}, {}, "INVALID_ARGUMENT", "lora_name"),
    "absolute adapter path": ({}, {"lora_name": "/etc/passwd"}, "INVALID_ARGUMENT", "lora_name"),
    "path parameter": ({}, {"lora_path": "/tmp"}, "UNIMPLEMENTED", "lora_path"),
    "malformed JSON": ({"sampling_parameters": '{"top_p": 0.5'}, {}, "INVALID_ARGUMENT", "sampling_parameters"),
    "JSON that is no object": ({"sampling_parameters": "[1]"}, {}, "INVALID_ARGUMENT", "sampling_parameters"),
    "wrong type": ({}, {"top_p": "much"}, "INVALID_ARGUMENT", "top_p"),
    "negative number": ({}, {"max_tokens": -1}, "INVALID_ARGUMENT", "max_tokens"),
    "absurd number": ({}, {"temperature": 1e30}, "INVALID_ARGUMENT", "temperature"),
    "not a number": (
        {"sampling_parameters": '{"top_p": NaN}'},
        {},
        "INVALID_ARGUMENT",
        "sampling_parameters: has the value NaN",
    ),
    "n beyond the limit": ({}, {"n": 1000}, "INVALID_ARGUMENT", "n: "),
    "unknown sampling key": ({}, {"tempratur": 1}, "INVALID_ARGUMENT", "temperature"),
    "unsupported sampling key": ({}, {"prompt_logprobs": 3}, "UNIMPLEMENTED", "prompt_logprobs"),
    "echo while streaming": (
        {"stream": True, "exclude_input_in_output": False},
        {},
        "INVALID_ARGUMENT",
        "exclude_input_in_output",
    ),
    "min above max": ({}, {"min_tokens": 9, "max_tokens": 3}, "INVALID_ARGUMENT", "min_tokens"),
    "two adapters": ({"lora_name": "upper", "adapter": "sort"}, {}, "INVALID_ARGUMENT", "adapter"),
    "empty prompt": ({"text_input": ""}, {}, "INVALID_ARGUMENT", "text_input"),
    "long prompt": ({"text_input": "x" * 5000}, {}, "INVALID_ARGUMENT", "text_input"),
    "10 MB prompt": ({"text_input": "x" * 10_000_000}, {}, "INVALID_ARGUMENT", "text_input"),
    "prompt and messages": ({"messages": "[]"}, {}, "INVALID_ARGUMENT", "messages"),
    "malformed messages": ({"text_input": None, "messages": "[{]"}, {}, "INVALID_ARGUMENT", "messages"),
    "image": ({"image": "aGVsbG8="}, {}, "UNIMPLEMENTED", "image"),
}


def values_of(changes: dict) -> dict:
    values = {"text_input": "hello", **changes}
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("case", BAD)
def test_over_grpc(server, case: str):
    changes, parameters, _, message = BAD[case]
    answer = grpc_call(server.grpc, values_of(changes), parameters, codes=False)
    assert answer.error is not None, answer.responses
    assert message in answer.error.message()
    assert answer.responses == []


def test_codes_over_grpc(launch):
    """By a server of its own and few: streams that end in codes are what tritonserver 2.51 was seen to abort over."""
    server = launch()
    for case in ("unknown adapter", "path parameter"):
        changes, parameters, code, message = BAD[case]
        answer = grpc_call(server.grpc, values_of(changes), parameters)
        assert answer.error is not None, answer.responses
        assert answer.error.status() == f"StatusCode.{code}"
        assert message in answer.error.message()


@pytest.mark.parametrize("case", BAD)
def test_over_http(server, case: str):
    changes, parameters, _, message = BAD[case]
    for path in ("generate", "generate_stream"):
        if path == "generate" and changes.get("stream"):
            continue
        got, text = http_post(server.http, path, {**values_of(changes), **parameters})
        assert message in json.loads(text.removeprefix("data: "))["error"], text
        assert got == 400


def test_invalid_utf8(server):
    answer = grpc_call(server.grpc, {"text_input": b"ab\xff"}, codes=False)
    assert "text_input" in answer.error.message()
    assert "UTF-8" in answer.error.message()


def test_wrong_shape_and_type(server):
    two = np.array([b"a", b"b"], dtype=object)
    assert "text_input" in grpc_call(server.grpc, {"text_input": two}, codes=False).error.message()
    number = np.array([3], dtype=np.int32)
    assert "text_input" in grpc_call(server.grpc, {"text_input": number}, codes=False).error.message()


def test_no_input_at_all(server):
    answer = grpc_call(server.grpc, {"stream": True}, codes=False)
    assert "text_input" in answer.error.message()


def test_a_body_that_is_no_json(server):
    status, text = http_post(server.http, "generate", b'{"text_input": ')
    assert status >= 400  # Triton's own answer: nothing of it reaches us
    assert "error" in json.loads(text)


def test_nobody_else_notices(server):
    """Good requests run all the while every bad one is sent; each gives its exact answer."""
    words = held_out_words(30, seed=5)
    wrong: list[str] = []

    def good() -> None:
        for word in words:
            for name in ("upper", "reverse"):
                values = {"text_input": word, "lora_name": name, "stream": True}
                text = grpc_call(server.grpc, values, GREEDY, codes=False).text
                if text != TASKS[name](word):
                    wrong.append(f"{name}({word}) = {text}")

    thread = threading.Thread(target=good)
    thread.start()
    for changes, parameters, *_ in BAD.values():
        # Without codes: with them tritonserver 2.51 aborts in some one of ten runs of this test, since its stream
        # handler then finishes a call twice (GRPC_CALL_ERROR_TOO_MANY_OPERATIONS).
        assert grpc_call(server.grpc, values_of(changes), parameters, codes=False).error is not None
    thread.join(60)
    assert not thread.is_alive()
    assert not wrong


def test_the_server_has_room_for_large_bodies(server):
    """tritonserver puts HTTP bodies on its stack; with the usual limit a large one could end it."""
    limits = Path(f"/proc/{server.pid}/limits").read_text()
    soft = next(line.split()[3] for line in limits.splitlines() if line.startswith("Max stack size"))
    assert soft == "unlimited" or int(soft) >= 2**28
