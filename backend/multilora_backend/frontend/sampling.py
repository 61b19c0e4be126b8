# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters: from the names and values of a client to a checked `SamplingParams`.

Names, defaults and ranges are vLLM's; upper bounds that vLLM leaves open are set where larger values make no sense.
Values may be JSON values or strings ("0.7", "true"), since load generators and Triton parameters send both.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.frontend.tensors import shown

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
"""Characters. What may begin a stop string is held back, so this bounds how late text can come."""
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20

_NUMBER = re.compile(r"[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})([eE][+-]?\d{1,4})?", re.ASCII)
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Number:
    """A whole or real number in [low, high], or in (low, high] if `above`."""

    whole: bool
    low: float
    high: float
    above: bool = False

    def __str__(self) -> str:
        bounds = f"{'(' if self.above else '['}{self.low}, {self.high}]"
        return f"{'an integer' if self.whole else 'a number'} in {bounds}"

    def read(self, name: str, value: object) -> int | float:
        number = value
        if isinstance(number, str) and _NUMBER.fullmatch(number.strip()):
            number = int(number) if number.strip().lstrip("+-").isdigit() else float(number)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise invalid(name, f"must be {self}, got {shown(value)}")
        fits = self.low < number if self.above else self.low <= number
        # NaN fails every comparison, so it is refused here too.
        if not (fits and number <= self.high) or (self.whole and number != int(number)):
            raise invalid(name, f"must be {self}, got {shown(value)}")
        return int(number) if self.whole else float(number)


@dataclass(frozen=True)
class Flag:
    def __str__(self) -> str:
        return "true or false"

    def read(self, name: str, value: object) -> bool:
        if isinstance(value, bool | str | int):
            known = _BOOLS.get(str(value).strip().lower())
            if known is not None:
                return known
        raise invalid(name, f"must be {self}, got {shown(value)}")


_COUNT_MAX = 2**31 - 1

SCALARS: dict[str, Number | Flag] = {
    "n": Number(True, 1, _COUNT_MAX),  # and at most the configuration's max_n
    "max_tokens": Number(True, 1, _COUNT_MAX),
    "min_tokens": Number(True, 0, _COUNT_MAX),
    "temperature": Number(False, 0, 100),
    "top_k": Number(True, -1, _COUNT_MAX),
    "top_p": Number(False, 0, 1, above=True),
    "min_p": Number(False, 0, 1),
    "presence_penalty": Number(False, -2, 2),
    "frequency_penalty": Number(False, -2, 2),
    "repetition_penalty": Number(False, 0, 10, above=True),
    "seed": Number(True, -(2**63), 2**63 - 1),
    "logprobs": Number(True, 0, MAX_LOGPROBS),
    "include_stop_str_in_output": Flag(),
    "ignore_eos": Flag(),
    "skip_special_tokens": Flag(),
}
"""Parameters with one value; `stop`, `stop_token_ids` and `logit_bias` are below."""

_LORA_PATH = "an adapter is chosen by its name (lora_name), and only the operator sets paths"

UNSUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "best_of": ((1,), "use n"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "length_penalty": ((1,), "beam search is not supported"),
    "early_stopping": ((False,), "beam search is not supported"),
    "prompt_logprobs": ((), "logprobs are reported for output tokens only"),
    "logprob_token_ids": ((), "use logprobs"),
    "flat_logprobs": ((False,), "logprobs have one format"),
    "bad_words": (([],), "use logit_bias"),
    "allowed_token_ids": (([],), "use logit_bias"),
    "truncate_prompt_tokens": ((), "a prompt is never cut"),
    "detokenize": ((True,), "the output is text"),
    "spaces_between_special_tokens": ((True,), "special tokens are joined as the tokenizer joins them"),
    "logits_processors": (([],), "code from clients is never run"),
    "thinking_token_budget": ((-1,), "thinking is not told from other output"),
    "repetition_detection": ((), "use the penalties"),
    "extra_args": (({},), "there are no plugins"),
    "response_format": (({"type": "text"},), "constrained output is not supported"),
    **dict.fromkeys(
        (
            "structured_outputs",
            "guided_decoding",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
        ),
        ((), "constrained output is not supported"),
    ),
    **dict.fromkeys(("lora_path", "lora_local_path", "lora_request", "lora_int_id"), ((), _LORA_PATH)),
}
"""What vLLM knows and we do not: name -> (values that are accepted since they change nothing, the reason)."""

INPUTS = frozenset(
    {"text_input", "messages", "stream", "sampling_parameters", "exclude_input_in_output"}
    | {f"return_{what}" for what in ("finish_reason", "cumulative_logprob", "logprobs")}
    | {"return_num_input_tokens", "return_num_output_tokens"}
)
"""Input tensors that are nothing but input tensors: refused with a hint where a sampling parameter is expected."""


def parse_sampling(values: Mapping[str, object], source: str, config: Config, vocab_size: int) -> SamplingParams:
    """Checks every name and value. A null means the default.

    `source` is what a message about an unknown key names. Raises MultiloraError: INVALID_ARG for a bad name or
    value, UNSUPPORTED for what vLLM would do and we do not.
    """
    given = {name: value for name, value in values.items() if value is not None}
    scalars = {**SCALARS, "n": Number(True, 1, config.max_n)}
    fields: dict[str, Any] = {"max_tokens": config.default_max_tokens}
    for name, value in given.items():
        if name in scalars:
            if name == "logprobs" and value is False:  # OpenAI's spelling of "none", which Triton's front end passes on
                continue
            fields[name] = scalars[name].read(name, value)
        elif name in _LISTS:
            fields[name] = _LISTS[name](value, vocab_size)
        else:
            _refuse(name, value, source)
    if fields.get("min_tokens", 0) > fields["max_tokens"]:
        raise invalid("min_tokens", f"must be at most max_tokens ({fields['max_tokens']}), got {fields['min_tokens']}")
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    if fields.get("seed") == -1:  # vLLM's "no seed"
        fields["seed"] = None
    return SamplingParams(**fields)


def _refuse(name: str, value: object, source: str) -> None:
    """Raises unless `name` is unsupported at a value that changes nothing."""
    if name in UNSUPPORTED:
        accepted, why = UNSUPPORTED[name]
        if not any(value == a or str(value).lower() == str(a).lower() for a in accepted):
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"{name}: is not supported: {why}")
        return
    if name in INPUTS:
        raise invalid(source, f"{name} is an input tensor of its own, not a sampling parameter")
    known = [*SCALARS, *_LISTS, "lora_name", "adapter", "request_priority", "tenant"]
    close = difflib.get_close_matches(name[:64], known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
    raise invalid(source, f"unknown key {shown(name)}{hint}")


def _items(name: str, value: object, limit: int, of: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise invalid(name, f"must be a list of {of}, got {shown(value)}")
    if len(value) > limit:
        raise invalid(name, f"must have at most {limit} entries, got {len(value)}")
    return list(value)


def _stop(value: object, vocab_size: int) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else _items("stop", value, MAX_STOP_STRINGS, "strings (or one string)")
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_LENGTH:
            raise invalid("stop", f"each must be a string of 1 to {MAX_STOP_LENGTH} characters, got {shown(string)}")
    return _unique(strings)


def _stop_token_ids(value: object, vocab_size: int) -> tuple[int, ...]:
    rule = Number(True, 0, vocab_size - 1)
    ids = _items("stop_token_ids", value, MAX_STOP_TOKEN_IDS, "token ids")
    return _unique(int(rule.read("stop_token_ids", item)) for item in ids)


def _logit_bias(value: object, vocab_size: int) -> dict[int, float] | None:
    if not isinstance(value, Mapping):
        raise invalid("logit_bias", f"must be an object of token ids and numbers, got {shown(value)}")
    if len(value) > MAX_LOGIT_BIASES:
        raise invalid("logit_bias", f"must have at most {MAX_LOGIT_BIASES} entries, got {len(value)}")
    token, bias = Number(True, 0, vocab_size - 1), Number(False, -(10**6), 10**6)
    # Clipped as vLLM does; the bound before it only keeps infinities out.
    biases = {
        int(token.read("logit_bias", key)): min(100.0, max(-100.0, bias.read("logit_bias", item)))
        for key, item in value.items()
    }
    return biases or None


def _unique(items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(items))


_LISTS: dict[str, Callable[[object, int], Any]] = {
    "stop": _stop,
    "stop_token_ids": _stop_token_ids,
    "logit_bias": _logit_bias,
}
