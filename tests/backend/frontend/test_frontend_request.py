# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from multilora_backend.config import Config
from multilora_backend.errors import ErrorCode
from multilora_backend.frontend.request import GenerateRequest

CHAT = json.dumps([{"role": "user", "content": "hi"}])


def test_the_smallest_request(parse, tokenizers) -> None:
    request = parse(text_input="the fox")
    assert request.prompt_text == "the fox"
    assert request.prompt_token_ids == tokenizers["byte_level"].encode("the fox")
    assert (request.adapter, request.stream, request.tenant, request.priority) == ("", False, "", 0)
    assert request.sampling.max_tokens == Config().default_max_tokens
    assert not any(getattr(request, name) for name in GenerateRequest.__dataclass_fields__ if "return" in name)


@pytest.mark.parametrize(
    ("stream", "exclude", "echo"),
    [
        (None, None, True),
        (False, None, True),
        (False, True, False),
        (False, False, True),
        (True, None, False),
        (True, True, False),
    ],
)
def test_echo(parse, stream: bool | None, exclude: bool | None, echo: bool) -> None:
    given = {"stream": stream, "exclude_input_in_output": exclude}
    request = parse(text_input="x", **{name: value for name, value in given.items() if value is not None})
    assert request.echo is echo
    assert request.stream is bool(stream)


def test_a_stream_cannot_repeat_the_prompt(parse, refused) -> None:
    message = refused(lambda: parse(text_input="x", stream=True, exclude_input_in_output=False))
    assert message.startswith("exclude_input_in_output: must be true or absent when stream is true")


def test_the_sampling_tensor_replaces_the_request_parameters(parse, refused) -> None:
    parameters = {"temperature": "0.5", "max_tokens": 3, "no such": 1}
    sampling = parse(parameters, text_input="x", sampling_parameters={"top_p": "0.5"}).sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.top_p) == (1.0, 16, 0.5)
    assert refused(lambda: parse(parameters, text_input="x")).startswith("parameters: unknown key 'no such'")


def test_request_parameters_set_sampling_and_tritons_own_are_ignored(parse) -> None:
    own = {"priority": 3, "timeout": 5, "sequence_id": 1, "triton_enable_empty_final_response": True, "headers": "a"}
    forwarded = {"X-Request-Id": "7", "binary_data_output": True}
    request = parse({"temperature": "0.5", "stop": "END", "ignore_eos": "true", **own, **forwarded}, text_input="x")
    assert (request.sampling.temperature, request.sampling.stop, request.sampling.ignore_eos) == (0.5, ("END",), True)


@pytest.mark.parametrize("name", ["lora_name", "adapter"])
@pytest.mark.parametrize("with_json", [True, False])
def test_the_adapter_is_read_from_tensor_then_parameter_then_json(parse, name: str, with_json: bool) -> None:
    options = {"sampling_parameters": {name: "json", "top_k": 5}} if with_json else {}
    assert parse({name: "parameter"}, text_input="x", **{name: "tensor"}, **options).adapter == "tensor"
    assert parse({name: "parameter"}, text_input="x", **options).adapter == "parameter"
    assert parse(text_input="x", **options).adapter == ("json" if with_json else "")


def test_an_empty_name_is_the_base_model_and_decides(parse) -> None:
    assert parse({"lora_name": "a"}, text_input="x", lora_name="").adapter == ""
    assert parse(text_input="x", lora_name="", card={"lora_enabled": False}).adapter == ""


def test_the_alias_must_agree(parse, refused) -> None:
    assert parse(text_input="x", lora_name="a", adapter="a").adapter == "a"
    message = "lora_name: and its alias adapter differ: 'a' and 'b'"
    assert refused(lambda: parse(text_input="x", lora_name="a", adapter="b")) == message
    assert refused(lambda: parse({"lora_name": "a", "adapter": "b"}, text_input="x")) == message
    both = {"lora_name": "a", "adapter": "b"}
    assert refused(lambda: parse(text_input="x", sampling_parameters=both)) == message
    assert parse({"adapter": "b"}, text_input="x", lora_name="a").adapter == "a"


@pytest.mark.parametrize("path", ["/etc/adapters/x", "../x", "a/b", "..", "a\\b"])
@pytest.mark.parametrize("where", ["tensor", "parameter", "json"])
def test_clients_name_adapters_and_never_paths(parse, refused, path: str, where: str) -> None:
    given = {
        "tensor": lambda: parse(text_input="x", lora_name=path),
        "parameter": lambda: parse({"lora_name": path}, text_input="x"),
        "json": lambda: parse(text_input="x", sampling_parameters={"lora_name": path}),
    }
    assert refused(given[where]).startswith("lora_name: must be the name of an adapter, not a path, got ")


@pytest.mark.parametrize("key", ["lora_path", "lora_local_path"])
def test_path_keys_are_refused(parse, refused, key: str) -> None:
    message = refused(lambda: parse({key: "/x"}, text_input="x"), ErrorCode.UNSUPPORTED)
    assert message.startswith(f"{key}: is not supported: an adapter is chosen by its name")


def test_lora_off_has_vllm_backends_words(parse, refused) -> None:
    call = lambda: parse(text_input="x", lora_name="a", card={"lora_enabled": False})  # noqa: E731
    assert refused(call, ErrorCode.UNSUPPORTED) == "LoRA feature is not enabled."


def test_priority_and_tenant_come_from_parameters_or_json(parse) -> None:
    request = parse({"request_priority": "-7", "tenant": "a b"}, text_input="x")
    assert (request.priority, request.tenant) == (-7, "a b")
    request = parse({"tenant": "p"}, text_input="x", sampling_parameters={"request_priority": 9, "tenant": "j"})
    assert (request.priority, request.tenant) == (9, "p")


def test_return_flags(parse) -> None:
    request = parse(text_input="x", return_finish_reason=True, return_num_output_tokens=True, return_logprobs=False)
    assert request.return_finish_reason
    assert request.return_num_output_tokens
    assert not request.return_logprobs
    assert not request.return_cumulative_logprob


def test_the_engine_computes_logprobs_for_the_sum_alone(parse) -> None:
    request = parse(text_input="x", return_cumulative_logprob=True, return_logprobs=True)
    assert (request.sampling.logprobs, request.has_logprobs) == (0, False)
    request = parse({"logprobs": 0}, text_input="x", return_logprobs=True)
    assert (request.sampling.logprobs, request.has_logprobs) == (0, True)
    assert parse(text_input="x", return_logprobs=True).sampling.logprobs is None


def test_messages_go_through_the_template(parse, tokenizers) -> None:
    request = parse(messages=CHAT)
    assert request.prompt_text == "<s>user: hi</s>bot:"
    expected = tokenizers["byte_level"].encode(request.prompt_text, add_special_tokens=False)
    assert request.prompt_token_ids == expected
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse(messages=json.dumps([{"role": "user", "content": parts}])).prompt_text == "<s>user: a\nb</s>bot:"


def test_max_tokens_is_cut_to_the_context(parse) -> None:
    assert len(parse(text_input="x" * 50).prompt_token_ids) == 51
    assert parse({"max_tokens": 1000}, text_input="x" * 50).sampling.max_tokens == 13
    assert parse({"max_tokens": 1000, "min_tokens": 13}, text_input="x" * 50).sampling.min_tokens == 13
    assert parse({"max_tokens": 1000}, text_input="x" * 62).sampling.max_tokens == 1
    assert parse({"max_tokens": 2}, text_input="x").sampling.max_tokens == 2


def test_what_triton_load_generators_and_its_openai_front_end_send(parse) -> None:
    genai_perf = {"max_tokens": "20", "min_tokens": "20"}
    request = parse(text_input="x", stream=True, exclude_input_in_output=True, sampling_parameters=genai_perf)
    assert (request.sampling.max_tokens, request.sampling.min_tokens) == (20, 20)
    openai = {"frequency_penalty": 0.0, "logprobs": False, "n": 1, "presence_penalty": 0.0, "best_of": 1}
    openai |= {"temperature": 0.7, "top_p": 1.0, "max_tokens": 16, "lora_name": "doll"}
    request = parse(text_input="x", stream=False, exclude_input_in_output=True, sampling_parameters=openai)
    assert (request.adapter, request.echo, request.sampling.temperature) == ("doll", False, 0.7)
