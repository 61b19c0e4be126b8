# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from multilora_backend.core import FinishReason, SamplingParams
from multilora_backend.frontend.request import GenerateRequest
from multilora_backend.frontend.response import ResponseBuilder
from multilora_backend.protocol import Output, TokenLogprob

EOS = 2  # </s> of the byte_fallback tokenizer
RETURNS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")


@pytest.fixture(scope="module")
def build(tokenizers) -> Callable[..., ResponseBuilder]:
    def run(returns: tuple[str, ...] = (), stream: bool = True, **sampling: object) -> ResponseBuilder:
        request = GenerateRequest(
            prompt_text="Q:",
            prompt_token_ids=[1, 80, 57],
            sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
            max_tokens=16,
            chat=False,
            adapter="",
            stream=stream,
            echo=not stream,
            tenant="",
            priority=0,
            has_logprobs="logprobs" in sampling,
            **{f"return_{name}": name in returns for name in RETURNS},
        )
        return ResponseBuilder(request, tokenizers["byte_fallback"])

    return run


def output(text: bytes, index: int = 0, end: FinishReason | None = None, eos: bool = False, **more: object) -> Output:
    ids = [3 + byte for byte in text] + [EOS] * eos
    return Output(request_id=1, index=index, token_ids=ids, finish_reason=end, **more)  # type: ignore[arg-type]


def texts(tensors: dict[str, np.ndarray] | None) -> list[bytes]:
    assert tensors is not None
    return list(tensors["text_output"])


def test_a_stream_sends_deltas_and_merges_what_waits(build) -> None:
    builder = build(RETURNS)
    assert builder.take() is None
    builder.add(output(b"a"))
    first = builder.take()
    assert texts(first) == [b"a"]
    assert first["finish_reason"].tolist() == [b"None"]
    assert builder.take() is None
    builder.add(output(b"b"))
    builder.add(output(b"cd"))
    builder.add(output(b"e", end=FinishReason.STOP, eos=True, cumulative_logprob=-1.5))
    assert builder.finished
    last = builder.take()
    assert texts(last) == [b"bcde"]
    assert last["finish_reason"].tolist() == [b"stop"]
    assert last["num_output_tokens"].tolist() == [5]  # EOS is counted, and no part of the text
    assert last["cumulative_logprob"].tolist() == [-1.5]
    assert last["logprobs"].tolist() == [b"null"]
    assert builder.take() is None
    assert builder.num_output_tokens == 6


def test_dtypes_and_shapes_are_vllm_backends(build) -> None:
    builder = build(RETURNS, n=2, logprobs=0)
    for index in range(2):
        builder.add(output(b"a", index, FinishReason.LENGTH))
    kinds = {name: (array.dtype, array.shape) for name, array in builder.take().items()}
    assert kinds == {
        "text_output": (np.object_, (2,)),
        "finish_reason": (np.object_, (2,)),
        "cumulative_logprob": (np.float32, (2,)),
        "logprobs": (np.object_, (2,)),
        "num_input_tokens": (np.uint32, (1,)),
        "num_output_tokens": (np.uint32, (2,)),
    }


def test_extra_outputs_come_only_when_asked_for(build) -> None:
    for name in RETURNS:
        builder = build((name,))
        builder.add(output(b"a"))
        assert set(builder.take()) == {"text_output", name}
    builder = build()
    builder.add(output(b"a"))
    assert set(builder.take()) == {"text_output"}


def test_without_streaming_there_is_one_response_with_the_prompt(build) -> None:
    builder = build(("num_output_tokens", "num_input_tokens", "finish_reason"), stream=False, n=2)
    builder.add(output(b"a", 1))
    builder.add(output(b"b", 0, FinishReason.LENGTH))
    assert builder.take() is None
    builder.add(output(b"c", 1, FinishReason.STOP, eos=True))
    tensors = builder.take()
    assert texts(tensors) == [b"Q:b", b"Q:ac"]
    assert tensors["finish_reason"].tolist() == [b"length", b"stop"]
    assert tensors["num_output_tokens"].tolist() == [1, 3]
    assert tensors["num_input_tokens"].tolist() == [3]
    assert builder.take() is None


def test_half_a_character_waits_and_its_tokens_are_counted_with_it(build) -> None:
    builder = build(("num_output_tokens",))
    for byte in "é".encode():
        assert builder.take() is None
        builder.add(output(bytes([byte])))
    tensors = builder.take()
    assert texts(tensors) == ["é".encode()]
    assert tensors["num_output_tokens"].tolist() == [2]
    builder.add(output(b"\xe4", end=FinishReason.LENGTH))
    assert texts(builder.take()) == ["\ufffd".encode()]


def test_an_end_without_text_is_sent(build) -> None:
    builder = build(("finish_reason",))
    builder.add(output(b"", end=FinishReason.STOP, eos=True))
    tensors = builder.take()
    assert texts(tensors) == [b""]
    assert tensors["finish_reason"].tolist() == [b"stop"]


def test_a_stop_string_ends_its_sequence_and_late_outputs_are_dropped(build) -> None:
    builder = build(("finish_reason", "num_output_tokens"), n=2, stop=("END",))
    assert builder.add(output(b"xE")) == []
    assert builder.add(output(b"y", 1)) == []
    assert texts(builder.take()) == [b"x", b"y"]
    assert builder.add(output(b"NDz")) == [0]
    assert not builder.finished
    tensors = builder.take()
    assert texts(tensors) == [b"", b""]
    assert tensors["finish_reason"].tolist() == [b"stop", b"None"]
    assert tensors["num_output_tokens"].tolist() == [2, 0]  # not the z
    assert builder.add(output(b"late")) == []
    assert builder.add(output(b"", end=FinishReason.ABORT)) == []
    assert builder.take() is None
    assert builder.add(output(b"v", 1, FinishReason.LENGTH)) == []
    last = builder.take()
    assert texts(last) == [b"", b"v"]
    assert last["finish_reason"].tolist() == [b"stop", b"length"]
    assert builder.finished
    assert builder.num_output_tokens == 6


def test_a_stop_string_wins_over_the_engines_own_end(build) -> None:
    builder = build(("finish_reason",), stop=("E",))
    assert builder.add(output(b"aEb", end=FinishReason.LENGTH)) == []  # the engine has ended it: nothing to abort
    tensors = builder.take()
    assert texts(tensors) == [b"a"]
    assert tensors["finish_reason"].tolist() == [b"stop"]


def test_a_stop_token_is_text_only_when_asked_for(build) -> None:
    for include, text in ((False, b"a"), (True, b"a.")):
        builder = build(("num_output_tokens",), stop_token_ids=(3 + ord("."),), include_stop_str_in_output=include)
        builder.add(output(b"a.", end=FinishReason.STOP))
        tensors = builder.take()
        assert texts(tensors) == [text]
        assert tensors["num_output_tokens"].tolist() == [2]


def entry(character: str, logprob: float) -> list[TokenLogprob]:
    top = TokenLogprob(3 + ord("t"), -0.1, 1)
    return [TokenLogprob(3 + ord(character), logprob, 2), top]


def test_logprobs_are_deltas_by_token_id(build) -> None:
    builder = build(("logprobs",), logprobs=1)
    builder.add(output(b"a", logprobs=[entry("a", -0.5)]))
    assert json.loads(builder.take()["logprobs"][0]) == [
        {
            str(3 + ord("a")): {"logprob": -0.5, "rank": 2, "decoded_token": "a"},
            str(3 + ord("t")): {"logprob": -0.1, "rank": 1, "decoded_token": "t"},
        }
    ]
    builder.add(output(b"b", logprobs=[entry("b", -np.inf)]))
    builder.add(output(b"t", logprobs=[entry("t", -0.1)]))
    b, t = json.loads(builder.take()["logprobs"][0], parse_constant=pytest.fail)
    assert b[str(3 + ord("b"))]["logprob"] == -9999.0
    assert list(t) == [str(3 + ord("t"))]


def test_logprobs_after_a_stop_string_are_taken_out_again(build) -> None:
    builder = build(("logprobs", "cumulative_logprob"), logprobs=1, stop=("E",))
    logprobs = [entry(c, -1.0) for c in "aEbc"]
    builder.add(output(b"aEbc", logprobs=logprobs, cumulative_logprob=-4.0))
    tensors = builder.take()
    assert tensors["cumulative_logprob"].tolist() == [-2.0]
    assert len(json.loads(tensors["logprobs"][0])) == 2


def test_the_text_of_a_stream_is_that_of_the_single_response(build) -> None:
    data = "the 🎉 naïve EN fox END late".encode()
    whole = build(stream=False, stop=("END",))
    whole.add(output(data, end=FinishReason.LENGTH))
    expected = "Q:the 🎉 naïve EN fox ".encode()
    assert texts(whole.take()) == [expected]
    for take_every in (1, 2, 7):
        builder, parts = build(stop=("END",)), []
        for i in range(len(data)):
            builder.add(output(data[i : i + 1]))
            if i % take_every == 0 and (tensors := builder.take()):
                parts += texts(tensors)
        if tensors := builder.take():
            parts += texts(tensors)
        assert builder.finished
        assert b"Q:" + b"".join(parts) == expected
        for part in parts:
            part.decode()
