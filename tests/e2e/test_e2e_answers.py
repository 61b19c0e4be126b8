# SPDX-License-Identifier: Apache-2.0
"""Every adapter's exact answer, over every way to ask for it, all mixed in one batch with the base model."""

from __future__ import annotations

import json
import time

import pytest

from tiny.tasks import ADAPTERS, BASE, TASKS, held_out_words
from triton_calls import Stream, grpc_call, http_events, http_post, in_threads

WORDS = held_out_words(25, seed=7)
GREEDY = {"temperature": 0.0, "max_tokens": 32}


def lora(name: str) -> dict:
    return {} if name == BASE else {"lora_name": name}


def test_all_adapters_and_the_base_in_one_stream(server, metrics):
    """Sent at once on one gRPC stream; some step must have run them all."""
    stream = Stream(server.grpc)
    sampling = json.dumps(GREEDY)
    sent = [
        (word, name, stream.send({"text_input": word, "stream": True, "sampling_parameters": sampling, **lora(name)}))
        for word in WORDS
        for name in TASKS
    ]
    for word, name, answer in sent:
        assert answer.done.wait(60)
        assert answer.text == TASKS[name](word), f"{name}({word})"
        assert answer.finals == 1
        assert len(answer.responses) >= 1
    stream.close()
    metrics(server).wait("multilora:adapters_per_step_max", len(ADAPTERS))


def test_streams_come_token_by_token(server):
    answer = grpc_call(
        server.grpc,
        {"text_input": "abcdefghij", "stream": True, "sampling_parameters": json.dumps(GREEDY), "lora_name": "upper"},
    )
    assert answer.text == "ABCDEFGHIJ"
    assert len(answer.responses) >= 5, "a stream is more than its last response"


@pytest.mark.parametrize("name", TASKS)
def test_http_generate(server, name: str):
    """One response, without the echo; the adapter as a parameter, numbers as strings."""
    body = {"text_input": WORDS[0], "exclude_input_in_output": True, "temperature": "0", "max_tokens": "32"}
    status, text = http_post(server.http, "generate", {**body, **lora(name)})
    assert status == 200, text
    assert json.loads(text)["text_output"] == TASKS[name](WORDS[0])


@pytest.mark.parametrize("name", TASKS)
def test_http_generate_stream(server, name: str):
    events = http_events(server.http, {"text_input": WORDS[1], "stream": True, "parameters": {**GREEDY, **lora(name)}})
    assert "".join(e["text_output"] for e in events) == TASKS[name](WORDS[1])


@pytest.mark.parametrize(
    ("values", "parameters"),
    [
        ({"lora_name": "rot13"}, {**GREEDY}),
        ({}, {**GREEDY, "lora_name": "rot13"}),
        ({"adapter": "rot13"}, {"temperature": "0.0", "max_tokens": "32"}),
        ({}, {**GREEDY, "adapter": "rot13"}),
        ({"sampling_parameters": json.dumps({**GREEDY, "lora_name": "rot13"})}, None),
        ({"sampling_parameters": json.dumps({"temperature": "0", "max_tokens": 32, "adapter": "rot13"})}, None),
        # The tensor wins over the parameter, and that over the JSON.
        ({"lora_name": "rot13", "sampling_parameters": json.dumps({**GREEDY, "lora_name": "x"})}, {"lora_name": "y"}),
        ({"sampling_parameters": json.dumps({**GREEDY, "lora_name": "x"})}, {"lora_name": "rot13"}),
    ],
)
def test_every_spelling_of_the_adapter(server, values: dict, parameters: dict | None):
    answer = grpc_call(server.grpc, {"text_input": "hello", "exclude_input_in_output": True, **values}, parameters)
    assert answer.error is None, answer.error
    assert answer.text == "uryyb"


def test_not_streaming_is_one_response_with_the_prompt_unless_excluded(server):
    values = {"text_input": "hello", "lora_name": "upper"}
    for exclude, expected in ((None, "helloHELLO"), (False, "helloHELLO"), (True, "HELLO")):
        flags = {} if exclude is None else {"exclude_input_in_output": exclude}
        answer = grpc_call(server.grpc, {**values, **flags}, GREEDY)
        assert [r["text_output"] for r in answer.responses] == [[expected]]
        assert answer.finals == 1


def test_extra_outputs_only_on_request(server):
    plain = grpc_call(server.grpc, {"text_input": "hello", "lora_name": "upper"}, GREEDY)
    assert set(plain.responses[0]) == {"text_output"}
    flags = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
    values = {"text_input": "hello", "lora_name": "upper", **{f"return_{flag}": True for flag in flags}}
    [response] = grpc_call(server.grpc, values, {**GREEDY, "logprobs": 2}).responses
    assert set(response) == {"text_output", *flags}
    assert response["finish_reason"] == ["stop"]
    assert response["num_output_tokens"] == [6], "five letters and the end"
    entries = json.loads(response["logprobs"][0])
    assert len(entries) == 6
    likeliest = min(entries[0].values(), key=lambda e: e["rank"])
    assert likeliest["decoded_token"] == "H"
    assert response["cumulative_logprob"][0] < 0

    values["stream"] = True
    streamed = grpc_call(server.grpc, values, GREEDY).responses
    assert sum(r["num_output_tokens"][0] for r in streamed) == 6, "streamed counts are deltas"
    assert streamed[-1]["finish_reason"] == ["stop"]


def test_length_n_seed_and_stop_strings(server):
    answer = grpc_call(
        server.grpc,
        {"text_input": "hello", "exclude_input_in_output": True, "return_finish_reason": True},
        {"temperature": 0.0, "max_tokens": 3},
    )
    assert answer.responses[0] == {"text_output": ["hel"], "finish_reason": ["length"]}

    sampling = {"n": 3, "seed": 11, "temperature": 9.0, "max_tokens": 12}
    values = {"text_input": "hello", "exclude_input_in_output": True, "sampling_parameters": json.dumps(sampling)}
    first, second = (grpc_call(server.grpc, values).responses[0]["text_output"] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3

    values = {"text_input": "abcdefghij", "lora_name": "upper"}
    values["sampling_parameters"] = json.dumps({**GREEDY, "stop": ["FG"]})
    [response] = grpc_call(server.grpc, {**values, "exclude_input_in_output": True}).responses
    assert response["text_output"] == ["ABCDE"]
    events = http_events(server.http, {**values, "stream": True})
    assert "".join(e["text_output"] for e in events) == "ABCDE"


def test_chat_goes_through_the_template(server):
    messages = json.dumps([{"role": "user", "content": "hello"}])
    body = {"messages": messages, "exclude_input_in_output": True, "lora_name": "reverse", **GREEDY}
    status, text = http_post(server.http, "generate", body)
    assert status == 200, text
    assert json.loads(text)["text_output"] == "olleh"


def test_characters_of_several_bytes_are_never_cut(server):
    """The tokenizer has one token a byte; the base is asked to echo what it cannot know well, but never half of it."""
    events = http_events(server.http, {"text_input": "añ日本😀", "stream": True, "temperature": 1.5, "max_tokens": 40})
    for event in events:
        event["text_output"].encode()
    answer = grpc_call(server.grpc, {"text_input": "añ日本😀", "stream": True}, {"temperature": 1.5, "max_tokens": 40})
    assert answer.error is None


def test_200_concurrent_streams(server, metrics):
    """200 gRPC streams and connections, each its own, over all adapters and the base."""
    names = [*TASKS]
    words = held_out_words(200, seed=3)

    def call(i: int):
        values = {"text_input": words[i], "stream": True, **lora(names[i % len(names)])}
        return lambda: grpc_call(server.grpc, values, GREEDY, timeout=100)

    started = time.monotonic()
    answers = in_threads(call(i) for i in range(200))
    assert time.monotonic() - started < 60
    wrong = [
        (names[i % len(names)], words[i], a.text, a.error)
        for i, a in enumerate(answers)
        if a.text != TASKS[names[i % len(names)]](words[i])
    ]
    assert len(wrong) <= 2, wrong  # the adapters are right on 98% and more, and a lost token would break them all
    metrics(server).wait("vllm:num_requests_running", 0)


def test_metrics_count_what_happened(server, metrics):
    m = metrics(server)
    counters = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    before = [m.settled(name) for name in counters]
    grpc_call(server.grpc, {"text_input": "hello", "lora_name": "upper"}, GREEDY)
    prompt, generated = (m.settled(name) - value for name, value in zip(counters, before, strict=True))
    assert (prompt, generated) == (7, 6), "begin, five letters, answer; five letters, end"
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_request_latency_seconds"):
        assert m.value(f"vllm:{name}_count") > 0
    assert m.value("multilora:adapters", state="active") == len(ADAPTERS)
    assert m.value("multilora:adapter_loads_total") >= len(ADAPTERS)
    assert m.value("vllm:lora_adapter_load_seconds_count") >= len(ADAPTERS)
    assert m.value("multilora:adapters_per_step_count") > 0
    assert m.value("vllm:request_success_total") > 0
    assert "vllm:lora_requests_info" in m.text()
    assert 0 <= m.value("vllm:kv_cache_usage_perc") <= 1
