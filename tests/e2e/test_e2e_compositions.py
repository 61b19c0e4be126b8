# SPDX-License-Identifier: Apache-2.0
"""Sums of adapters, over every way to ask for one, in one batch with their parts and the base model."""

from __future__ import annotations

import json

import pytest

from multilora_client import AdapterNotFound, Client, InvalidRequest
from tiny.tasks import held_out_words
from triton_calls import Stream, grpc_call

WORDS = held_out_words(6, seed=11)
GREEDY = {"temperature": 0.0, "max_tokens": 32}
SUM = "upper:0.7,reverse:0.7"


def both(word: str) -> str:
    return word[::-1].upper()


def test_mixed_in_one_stream(server, metrics):
    expected = {SUM: both, "upper:1,reverse:1": both, "upper": str.upper, "upper:0": str}
    stream = Stream(server.grpc)
    common = {"stream": True, "sampling_parameters": json.dumps(GREEDY)}
    sent = [
        (name, word, stream.send({**common, "text_input": word, "lora_name": name}))
        for word in WORDS
        for name in expected
    ]
    for name, word, answer in sent:
        assert answer.done.wait(60)
        assert answer.text == expected[name](word), f"{name}({word})"
    stream.close()
    first_tokens = "multilora:adapter_time_to_first_token_seconds_count"
    assert metrics(server).settled(first_tokens, adapter_name="__composed__") >= 2 * len(WORDS)


def test_as_json_and_by_the_client(server):
    said = json.dumps({**GREEDY, "lora_name": {"upper": 0.7, "reverse": 0.7}})
    assert grpc_call(server.grpc, {"text_input": "hello", "stream": True, "sampling_parameters": said}).text == "OLLEH"
    with Client(server.grpc) as client:
        assert client.generate("hello", {"upper": 0.7, "reverse": 0.7}, **GREEDY).text == "OLLEH"
        with pytest.raises(InvalidRequest, match="the weight of 'upper' must be within 1000, got 1001"):
            client.generate("hello", {"upper": 1001}, **GREEDY)
        with pytest.raises(AdapterNotFound, match="LoRA nobody is not supported"):
            client.generate("hello", {"upper": 1, "nobody": 0.5}, **GREEDY)
        assert "__composed__" not in str(client.adapters.list())
