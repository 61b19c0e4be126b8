# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.sampling import SCALARS, UNSUPPORTED, Flag, parse_sampling

CONFIG = Config(default_max_tokens=24, max_n=4)
VOCAB = 400


def parse(**values: object) -> SamplingParams:
    return parse_sampling(values, "sampling_parameters", CONFIG, VOCAB)


def test_defaults_are_vllms_and_the_configurations() -> None:
    assert parse() == SamplingParams(max_tokens=24)
    assert parse(**dict.fromkeys([*SCALARS, "stop", "stop_token_ids", "logit_bias", "guided_json"])) == parse()


ACCEPTED = [
    ("max_tokens", "7", 7),
    ("max_tokens", 7.0, 7),
    ("max_tokens", "7.0", 7),
    ("max_tokens", 2**31 - 1, 2**31 - 1),
    ("temperature", 0, 0.0),
    ("temperature", "0.7", 0.7),
    ("temperature", " 1e-1 ", 0.1),
    ("top_k", -1, 0),
    ("top_k", 0, 0),
    ("top_k", "50", 50),
    ("top_p", 1, 1.0),
    ("top_p", ".5", 0.5),
    ("min_p", 0, 0.0),
    ("presence_penalty", -2, -2.0),
    ("frequency_penalty", "2", 2.0),
    ("repetition_penalty", 1.1, 1.1),
    ("seed", -(2**63), -(2**63)),
    ("seed", str(2**63 - 1), 2**63 - 1),
    ("seed", -1, None),
    ("logprobs", 0, 0),
    ("logprobs", False, None),
    ("n", 4, 4),
    ("ignore_eos", "true", True),
    ("ignore_eos", 1, True),
    ("skip_special_tokens", "False", False),
    ("include_stop_str_in_output", True, True),
    ("stop", "END", ("END",)),
    ("stop", ["a", "b", "a"], ("a", "b")),
    ("stop", [], ()),
    ("stop_token_ids", [5, "6", 399, 5], (5, 6, 399)),
    ("logit_bias", {"7": 1, "8": -500, "9": "2.5"}, {7: 1.0, 8: -100.0, 9: 2.5}),
    ("logit_bias", {}, None),
]


@pytest.mark.parametrize(("name", "value", "expected"), ACCEPTED)
def test_values_are_cast(name: str, value: object, expected: object) -> None:
    got = getattr(parse(**{name: value}), name)
    assert got == expected
    assert type(got) is type(expected)


REFUSED = [
    ("max_tokens", 0, "must be an integer in [1, 2147483647], got 0"),
    ("max_tokens", -5, "must be an integer in [1, 2147483647], got -5"),
    ("max_tokens", 2**31, "must be an integer in [1, 2147483647], got 2147483648"),
    ("max_tokens", 10**400, "must be an integer in"),
    ("max_tokens", 7.5, "must be an integer in"),
    ("max_tokens", "7.5", "must be an integer in"),
    ("max_tokens", "seven", "must be an integer in [1, 2147483647], got 'seven'"),
    ("max_tokens", "1_000", "must be an integer in"),
    ("max_tokens", "٣", "must be an integer in"),
    ("max_tokens", True, "must be an integer in"),
    ("max_tokens", [7], "must be an integer in"),
    ("max_tokens", "", "must be an integer in"),
    ("max_tokens", "9" * 5000, "must be an integer in"),
    ("min_tokens", -1, "must be an integer in [0, 2147483647], got -1"),
    ("min_tokens", 25, "must be at most max_tokens (24), got 25"),
    ("temperature", -0.1, "must be a number in [0, 100], got -0.1"),
    ("temperature", 101, "must be a number in [0, 100], got 101"),
    ("temperature", float("nan"), "must be a number in [0, 100], got nan"),
    ("temperature", float("inf"), "must be a number in"),
    ("temperature", "nan", "must be a number in"),
    ("temperature", "1e999", "must be a number in"),
    ("temperature", {"a": 1}, "must be a number in"),
    ("top_k", -2, "must be an integer in [-1, 2147483647], got -2"),
    ("top_p", 0, "must be a number in (0, 1], got 0"),
    ("top_p", 3.0, "must be a number in (0, 1], got 3.0"),
    ("min_p", 1.01, "must be a number in [0, 1], got 1.01"),
    ("presence_penalty", 2.1, "must be a number in [-2, 2], got 2.1"),
    ("frequency_penalty", -2.1, "must be a number in [-2, 2], got -2.1"),
    ("repetition_penalty", 0, "must be a number in (0, 10], got 0"),
    ("seed", 2**63, "must be an integer in"),
    ("logprobs", 21, "must be an integer in [0, 20], got 21"),
    ("logprobs", True, "must be an integer in [0, 20], got True"),
    ("n", 0, "must be an integer in [1, 4], got 0"),
    ("n", 5, "must be an integer in [1, 4], got 5"),
    ("ignore_eos", "maybe", "must be true or false, got 'maybe'"),
    ("ignore_eos", 2, "must be true or false, got 2"),
    ("ignore_eos", [], "must be true or false, got []"),
    ("stop", "", "each must be a string of 1 to 1024 characters, got ''"),
    ("stop", ["a", 5], "each must be a string of 1 to 1024 characters, got 5"),
    ("stop", "x" * 1025, "each must be a string of 1 to 1024 characters"),
    ("stop", ["a"] * 17, "must have at most 16 entries, got 17"),
    ("stop", 5, "must be a list of strings (or one string), got 5"),
    ("stop_token_ids", 5, "must be a list of token ids, got 5"),
    ("stop_token_ids", [400], "must be an integer in [0, 399], got 400"),
    ("stop_token_ids", [-1], "must be an integer in [0, 399], got -1"),
    ("stop_token_ids", [1] * 129, "must have at most 128 entries, got 129"),
    ("logit_bias", [1], "must be an object of token ids and numbers, got [1]"),
    ("logit_bias", {"400": 1}, "must be an integer in [0, 399], got '400'"),
    ("logit_bias", {"x": 1}, "must be an integer in [0, 399], got 'x'"),
    ("logit_bias", {"1": float("-inf")}, "must be a number in"),
    ("logit_bias", {"1": None}, "must be a number in"),
    ("logit_bias", {str(i): 0 for i in range(1025)}, "must have at most 1024 entries, got 1025"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_bad_values_name_the_field_and_the_limit(name: str, value: object, message: str) -> None:
    with pytest.raises(MultiloraError) as caught:
        parse(**{name: value})
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert caught.value.message.startswith(f"{name}: {message}")
    assert len(caught.value.message) < 200


def test_min_tokens_may_be_as_large_as_max_tokens() -> None:
    assert parse(max_tokens="50", min_tokens="50").min_tokens == 50  # what genai-perf sends


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tempratur", "sampling_parameters: unknown key 'tempratur'; did you mean 'temperature'?"),
        ("priority", "sampling_parameters: unknown key 'priority'; did you mean 'request_priority'?"),
        ("lora", "sampling_parameters: unknown key 'lora'; did you mean 'lora_name'?"),
        ("zzz", "sampling_parameters: unknown key 'zzz'; known are n, max_tokens"),
        ("stream", "sampling_parameters: stream is an input tensor of its own, not a sampling parameter"),
        ("x" * 10**6, "sampling_parameters: unknown key 'xxx"),
    ],
)
def test_unknown_keys(name: str, message: str) -> None:
    with pytest.raises(MultiloraError) as caught:
        parse(**{name: 1})
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_vllm_knows_and_we_do_not_is_refused_by_name(name: str) -> None:
    with pytest.raises(MultiloraError) as caught:
        parse(**{name: "on"})
    assert caught.value.code is ErrorCode.UNSUPPORTED
    assert caught.value.message.startswith(f"{name}: is not supported: ")


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (values, _) in UNSUPPORTED.items() for v in values])
def test_unsupported_names_are_fine_where_they_change_nothing(name: str, value: object) -> None:
    assert parse(**{name: value}) == parse(**{name: str(value)}) == parse()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from([*SCALARS, "stop", "stop_token_ids", "logit_bias", *UNSUPPORTED]), value=JSON)
def test_any_value_is_accepted_or_refused_in_words(name: str, value: object) -> None:
    """No other exception, and nothing gets through that the wire or the engine could not hold."""
    message = f"{name}: "
    try:
        sampling = parse(**{name: value})
    except MultiloraError as error:
        message = error.message
    else:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=SamplingParams) == sampling
    assert message.startswith(f"{name}: ")


def test_the_table_covers_every_scalar_of_the_engine() -> None:
    others = {"stop", "stop_token_ids", "logit_bias"}
    assert set(SCALARS) | others == set(SamplingParams.__struct_fields__)
    flags = {name for name, rule in SCALARS.items() if isinstance(rule, Flag)}
    assert flags == {name for name in SCALARS if isinstance(getattr(SamplingParams(), name), bool)}
