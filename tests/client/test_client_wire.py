# SPDX-License-Identifier: Apache-2.0
"""The parts of the client that do no I/O."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_client import InvalidRequest, RequestTimeout, ServerUnavailable
from multilora_client.errors import code_of_text
from multilora_client.exchange import Exchange
from multilora_client.table import comparison
from multilora_client.types import Choice, Chunk, Completion
from multilora_client.wire import EventParser, build_request

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(texts, max_size=4), st.lists(st.integers(0, 200)), st.sampled_from(["\n", "\r\n"]))
def test_events_survive_any_cut(events, cuts, end):
    body = "".join(f": note{end}data: {json.dumps(e, ensure_ascii=False)}{end}{end}" for e in events).encode()
    parser, got, at = EventParser(), [], 0
    for cut in [*sorted(cuts), len(body)]:
        got += parser.feed(body[at : max(at, cut)])
        at = max(at, cut)
    assert [json.loads(event) for event in got] == events


def test_event_of_several_lines_and_unfinished_event():
    assert list(EventParser().feed(b"data: a\ndata:b\nid: 7\n\n\ndata: lost\n")) == ["a\nb"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("LoRA 'a\nb' is not supported, we currently support ['x']", "NOT_FOUND"),
        ("Request for unknown model: 'm' version 1 is not at ready state", "UNAVAILABLE"),
        ("Request for unknown model: 'm' is not found", "NOT_FOUND"),
        (
            "Failed to process the request(s) for model 'm', message: Stub process 'm' is not healthy.",
            "UNAVAILABLE",
        ),
        ("Failed to process the request(s) for model 'm', message: KeyError: 'unavailable'", "INTERNAL"),
        ("too many waiting requests: max_waiting is 10", "UNAVAILABLE"),
        ("LoRA a could not be loaded: q_proj has NaN", "INTERNAL"),
        ("text_input: unavailable", "DEFAULT"),
        ("unavailability", "DEFAULT"),
    ],
)
def test_code_of_an_error_that_is_text_alone(text, code):
    assert code_of_text(text, "DEFAULT") == code


def exchange(timeout=math.inf, retries=2, stream=True):
    request = build_request("m", "hello", adapter=None, stream=stream, sampling={})
    made = Exchange(request, timeout, retries)
    made.start()
    return made


def test_backoff_grows_and_ends():
    error = ServerUnavailable("busy")
    for _ in range(50):
        retrying = exchange(retries=7)
        delays = [retrying.backoff(error) for _ in range(7)]
        for i, delay in enumerate(delays):
            step = min(2.0, 0.1 * 2**i)
            assert step / 2 <= delay <= step
        with pytest.raises(ServerUnavailable, match="busy"):
            retrying.backoff(error)


def test_no_retry_that_would_only_wait_for_the_deadline():
    with pytest.raises(ServerUnavailable, match="busy"):
        exchange(timeout=0.04).backoff(ServerUnavailable("busy"))


def test_no_retry_after_a_token():
    started = exchange()
    started.take(Chunk((Choice("a", None, 1),), 3, False))
    with pytest.raises(ServerUnavailable):
        started.backoff(ServerUnavailable("gone"))


def test_deadline():
    assert exchange().remaining() is None
    assert 0 < exchange(timeout=60).remaining() <= 60
    with pytest.raises(RequestTimeout):
        exchange(timeout=1e-9).remaining()


def test_streams_never_say_exclude_false():
    """vllm_backend refuses a stream with exclude_input_in_output = false; without it a plain answer has the prompt."""
    streamed = build_request("m", "x", adapter=None, stream=True, sampling={}).tensors
    plain = build_request("m", "x", adapter=None, stream=False, sampling={}).tensors
    assert "exclude_input_in_output" not in streamed
    assert plain["exclude_input_in_output"] is True


def test_table_is_aligned_by_columns_and_keeps_to_its_width():
    def completion(text):
        return Completion((Choice(text, "stop", 12),), 3, None, 0.0123, 0.5)

    names = ["base", "大文字", "broken"]
    results = [completion("plain"), completion("日本" * 40 + "\x1b[31m\n"), InvalidRequest("two\nlines")]
    lines = comparison(names, results, width=80).split("\n")
    assert len(lines) == 4
    assert lines[1].startswith("base     12      stop    12.3     24.0      plain")
    assert lines[2].startswith("大文字   12      stop    12.3     24.0      日本")
    assert lines[2].endswith("…")
    # Every kanji takes two columns: 3 in the name, and all of the cut text.
    assert len(lines[2]) + sum(ord(char) > 0x3000 for char in lines[2]) <= 80
    assert lines[3].startswith("broken   -       error   -        -         two\\nlines")
    wide = comparison(names, results, width=400)
    assert "\x1b" not in wide
    assert r"\x1b[31m\n" in wide


@pytest.mark.parametrize(
    ("adapter", "sent"),
    [
        ("a:0.7,b:0.3", "a:0.7,b:0.3"),
        ({"a": 0.7, "b": -1}, "a:0.7,b:-1.0"),
        ({"a": 1e-6}, "a:1e-06"),
        ({}, None),
        ("", None),
    ],
)
def test_sums_of_adapters(adapter, sent):
    request = build_request("m", "x", adapter=adapter, stream=False, sampling={})
    assert request.tensors.get("lora_name") == request.adapter == sent


@pytest.mark.parametrize("weight", [None, "much", 10**400])
def test_weights_that_are_no_numbers(weight):
    with pytest.raises(InvalidRequest, match="adapter: weights must be numbers"):
        build_request("m", "x", adapter={"a": weight}, stream=False, sampling={})
