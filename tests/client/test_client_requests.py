# SPDX-License-Identifier: Apache-2.0
"""Both clients over both protocols against a fake Triton: what is sent, and what comes back."""

from __future__ import annotations

import json
import threading

import pytest

from multilora_client import Client, InvalidRequest, ServerError

WORDS = ["héllo ", "wörld", " 日本", "🎉\n"]


def test_generate_sends_vllm_tensors(connect, fake, steps, protocol):
    fake.play([steps.reply("HELLO", "length", tokens=5, final=True)])
    completion = connect().generate("hello", "upper", max_tokens=5, temperature=0, stop=["é"], seed=None)

    (received,) = fake.received
    assert received["model"] == "multilora"
    assert received["text_input"] == "hello"
    assert received["lora_name"] == "upper"
    assert json.loads(received["sampling_parameters"]) == {"max_tokens": 5, "temperature": 0, "stop": ["é"]}
    flags = {name for name, value in received.items() if value is True}
    wanted = {"return_finish_reason", "return_num_input_tokens", "return_num_output_tokens"}
    # Over HTTP only a stream can be cancelled, and a stream never has the prompt in it.
    assert flags == wanted | ({"exclude_input_in_output"} if protocol == "grpc" else {"stream"})
    assert received.get("exclude_input_in_output") is not False

    assert completion.text == "HELLO"
    assert completion.finish_reason == "length"
    assert (completion.num_input_tokens, completion.num_output_tokens) == (7, 5)
    assert completion.adapter == "upper"
    assert (completion.cumulative_logprob, completion.logprobs) == (None, None)
    assert completion.total_s > 0
    assert (completion.ttft_s is None) == (protocol == "grpc")


@pytest.mark.parametrize("adapter", [None, ""])
def test_base_model_sends_neither_adapter_nor_sampling(connect, fake, adapter):
    completion = connect().generate("hello", adapter)
    assert {"lora_name", "sampling_parameters"}.isdisjoint(fake.received[0])
    assert completion.adapter is None


@pytest.mark.parametrize("split", [0, 1, 7])
def test_stream_gives_deltas_and_marks_the_last(connect, fake, steps, split):
    fake.split = split
    *first, last = WORDS
    fake.play([*(steps.reply(word) for word in first), steps.reply(last, "stop", final=True)])
    chunks, completion = connect().stream("hello", "upper")

    assert fake.received[0]["stream"] is True
    assert [chunk.text for chunk in chunks] == WORDS
    assert [chunk.final for chunk in chunks] == [False, False, False, True]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert completion.text == "".join(WORDS)
    assert completion.num_output_tokens == 4
    assert completion.finish_reason == "stop"
    assert 0 < completion.ttft_s <= completion.total_s


def test_first_chunk_does_not_wait_for_the_second(connect, fake, steps, stopwatch):
    fake.play([steps.reply("now"), steps.hang])
    connect().break_after(1, "hello")
    assert stopwatch() < 4


def test_chat_sends_messages_instead_of_text(connect, fake):
    messages = [{"role": "system", "content": 'say "é"'}, {"role": "user", "content": "日\u2028本"}]
    assert connect().chat(messages, "upper").text == "ok"
    assert json.loads(fake.received[0]["messages"]) == messages
    assert "text_input" not in fake.received[0]


def test_several_texts_end_at_different_times(connect, fake, steps):
    fake.play(
        [
            steps.reply(["a", "x"]),
            steps.reply(["b", ""], extra={"finish_reason": ["None", "stop"], "num_output_tokens": [1, 0]}),
            steps.reply(
                ["c", ""], final=True, extra={"finish_reason": ["length", "stop"], "num_output_tokens": [1, 0]}
            ),
        ]
    )
    chunks, completion = connect().stream("hello", n=2)
    assert [chunk.final for chunk in chunks] == [False, False, True]
    assert [(c.text, c.finish_reason, c.num_output_tokens) for c in completion.choices] == [
        ("abc", "length", 3),
        ("x", "stop", 1),
    ]


def test_logprobs_are_asked_for_and_joined(connect, fake, steps):
    def token(token_id, logprob, text):
        return json.dumps([{token_id: {"logprob": logprob, "rank": 1, "decoded_token": text}}])

    def extra(total, logprobs):
        return {"cumulative_logprob": [total], "logprobs": [logprobs]}

    fake.play(
        [
            steps.reply("a", extra=extra(-0.5, token(11, -0.5, "a"))),
            steps.reply("é", "stop", final=True, extra=extra(-0.75, token(12, -0.25, "é"))),
        ]
    )
    chunks, completion = connect().stream("hello", logprobs=0)
    assert fake.received[0]["return_logprobs"] is True
    assert fake.received[0]["return_cumulative_logprob"] is True
    assert [chunk.cumulative_logprob for chunk in chunks] == [-0.5, -0.75]
    assert completion.cumulative_logprob == -0.75
    assert [list(token) for token in completion.logprobs] == [[11], [12]]
    assert completion.logprobs[1][12].text == "é"
    assert completion.logprobs[1][12].logprob == -0.25


def test_many_requests_share_one_client(connect, fake, steps):
    fake.play([steps.reply("a"), steps.reply("b", "stop", final=True)])
    completions = connect().many([("hello", f"adapter{i}") for i in range(32)])
    assert [c.text for c in completions] == ["ab"] * 32
    assert [c.adapter for c in completions] == [f"adapter{i}" for i in range(32)]
    assert {r["lora_name"] for r in fake.received} == {f"adapter{i}" for i in range(32)}


def test_large_prompt_arrives_whole(connect, fake):
    prompt = "é日🎉x" * 600_000  # 6 MB, above gRPC's default of 4 MB for one message
    connect().generate(prompt)
    assert fake.received[0]["text_input"] == prompt


def test_headers_are_sent_with_every_request(connect, fake):
    connect(headers={"X-Tenant": "blue"}).generate("hello")
    assert fake.received[0]["headers"]["x-tenant"] == "blue"


@pytest.mark.parametrize("headers", [{"x": "日"}, {"x": "a\r\ny: b"}, {"x y": "a"}, {"": "a"}])
def test_headers_that_cannot_be_sent_are_named(connect, headers: dict[str, str]):
    with pytest.raises(
        ValueError, match=f"headers: {next(iter(headers))!r} must be a header's name and have printable"
    ):
        connect(headers=headers)


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"prompt": "a\ud800"}, "text_input"),
        ({"prompt": "a", "adapter": "\udcff"}, "lora_name"),
        ({"prompt": "a", "temperature": float("nan")}, "sampling_parameters"),
        ({"prompt": "a", "stop": {"x"}}, "sampling_parameters"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(connect, fake, keywords, field):
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        connect().generate(**keywords)
    assert fake.received == []


def test_unknown_sampling_key_is_left_to_the_server(connect, fake):
    connect().generate("hello", temprature=0.5)
    assert json.loads(fake.received[0]["sampling_parameters"]) == {"temprature": 0.5}


@pytest.mark.parametrize(
    "extra",
    [{"text_output": []}, {"num_output_tokens": [1, 1]}, {"logprobs": ["nonsense"]}, {"logprobs": ["[[5]]"]}],
)
def test_answers_that_make_no_sense_are_server_errors(connect, fake, steps, extra):
    fake.play([steps.reply("a", "stop", final=True, extra=extra)])
    with pytest.raises(ServerError):
        connect().generate("hello")


def test_ready(connect, fake):
    client = connect()
    assert client.ready()
    assert not connect(model="other").ready()
    fake.ready = False
    assert not client.ready()


def test_ready_waits(connect, fake, stopwatch):
    fake.ready = False
    timer = threading.Timer(0.3, setattr, (fake, "ready", True))
    timer.start()
    assert connect().ready(5)
    assert 0.3 <= stopwatch() < 4
    timer.join()


def test_ready_is_false_without_a_server(connect):
    assert not connect("127.0.0.1:9").ready()


@pytest.mark.parametrize(
    "arguments",
    [{"protocol": "ftp"}, {"timeout": 0}, {"retries": -1}, {"url": "ftp://x"}, {"url": "x:y"}, {"url": "http://"}],
)
def test_bad_settings_are_refused_at_once(arguments):
    with pytest.raises(ValueError, match=r"^(protocol|timeout|retries|url): "):
        Client(**arguments)
