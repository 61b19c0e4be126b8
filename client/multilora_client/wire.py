# SPDX-License-Identifier: Apache-2.0
"""A request as named tensors and a response from named tensors, whatever protocol carries them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from multilora_client.errors import InvalidRequest, ServerError
from multilora_client.types import AdapterChoice, Choice, Chunk, Message, TokenLogprob


@dataclass(frozen=True)
class Request:
    """A request, ready to be sent any number of times."""

    model: str
    tensors: Mapping[str, str | bool]
    """Input tensors of one element each: str is BYTES, bool is BOOL."""
    adapter: str | None
    """For error messages and results; the server reads the tensor."""
    output: str = "text_output"
    """The tensor that has the answer's text."""


class RemainingTime(Protocol):
    """Seconds until the request's deadline, None without one; raises RequestTimeout when it has passed."""

    def __call__(self) -> float | None: ...


def build_request(
    model: str,
    prompt: str | Sequence[Message],
    *,
    adapter: AdapterChoice | None,
    stream: bool,
    sampling: Mapping[str, Any],
) -> Request:
    """Raises InvalidRequest if something cannot be written as UTF-8 or JSON; all else is the server's to judge."""
    tensors: dict[str, str | bool] = {}
    if isinstance(prompt, str):
        tensors["text_input"] = prompt
    else:
        tensors["messages"] = _to_json("messages", list(prompt))
    named = _named(adapter)
    if named:
        tensors["lora_name"] = named
    given = {key: value for key, value in sampling.items() if value is not None}
    if given:
        tensors["sampling_parameters"] = _to_json("sampling_parameters", given)
    tensors["stream"] = stream
    if not stream:
        # vllm_backend's rule: the prompt comes first in the text unless this is set; streams never have it.
        tensors["exclude_input_in_output"] = True
    for name in ("finish_reason", "num_input_tokens", "num_output_tokens"):
        tensors[f"return_{name}"] = True
    if "logprobs" in given:
        tensors["return_logprobs"] = tensors["return_cumulative_logprob"] = True
    for name, value in tensors.items():
        _require_utf8(name, value)
    return Request(model, tensors, named or None)


def _named(adapter: AdapterChoice | None) -> str:
    """As the server reads it; which weights make sense is for the server to judge."""
    if adapter is None or isinstance(adapter, str):
        return adapter or ""
    try:
        return ",".join(f"{name}:{float(weight)!r}" for name, weight in adapter.items())
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"adapter: weights must be numbers: {error}") from error


def build_command(model: str, action: str, arguments: Mapping[str, Any], token: str) -> Request:
    """A command to the model that administers adapters. Arguments that are None are left out; so is an empty token."""
    given = {key: value for key, value in arguments.items() if value is not None}
    body = {"action": action, **given, **({"token": token} if token else {})}
    tensors: dict[str, str | bool] = {"request": _to_json("request", body)}
    _require_utf8("request", tensors["request"])
    return Request(model, tensors, given.get("name") or given.get("target"), output="result")


def parse_result(text: str) -> dict[str, Any]:
    """What a command answered. Raises ServerError if it is no JSON object."""
    try:
        result = json.loads(text)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise ServerError(f"a command's result that is not a JSON object: {text[:200]}")
    return result


def parse_chunk(outputs: Mapping[str, Sequence[Any]], final: bool, output: str = "text_output") -> Chunk:
    """A Chunk from output tensors by name; tensors that were not asked for may be missing.

    Raises ServerError if there is no text or a value is not what its name promises.
    """
    texts = outputs.get(output)
    if not texts:
        raise ServerError(f"a response without {output}, only {sorted(outputs)}")

    def column(name: str, default: Any) -> Sequence[Any]:
        values = outputs.get(name) or [default] * len(texts)
        if len(values) != len(texts):
            raise ServerError(f"a response with {len(texts)} texts but {len(values)} values of {name}")
        return values

    choices = tuple(
        Choice(
            text=text,
            # vllm_backend writes str(None) while a text goes on.
            finish_reason=None if reason in (None, "", "None", "null") else reason,
            num_output_tokens=int(count),
            cumulative_logprob=cumulative,
            logprobs=_parse_logprobs(logprobs),
        )
        for text, reason, count, cumulative, logprobs in zip(
            texts,
            column("finish_reason", None),
            column("num_output_tokens", 0),
            column("cumulative_logprob", None),
            column("logprobs", None),
            strict=True,
        )
    )
    (num_input_tokens,) = outputs.get("num_input_tokens") or (0,)
    return Chunk(choices, int(num_input_tokens), final)


class EventParser:
    """Server-sent events out of byte chunks cut anywhere, also inside a UTF-8 character or a line end."""

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[str]:
        """Yields the data of each event that is complete. Comments and fields other than data are dropped."""
        *lines, self._tail = (self._tail + data).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                event, self._data = b"\n".join(self._data), []
                # Decoded only now, when the event is whole.
                yield event.decode("utf-8", "replace")


def _parse_logprobs(text: str | None) -> tuple[dict[int, TokenLogprob], ...] | None:
    if text is None:
        return None
    try:
        tokens = json.loads(text)
        if tokens is None:
            return None
        return tuple(
            {
                int(token_id): TokenLogprob(value["logprob"], value["rank"], value["decoded_token"])
                for token_id, value in token.items()
            }
            for token in tokens
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(f"logprobs are not as expected ({error!r}): {text[:200]}") from error


def _to_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{name}: cannot be written as JSON: {error}") from error


def _require_utf8(name: str, value: str | bool) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{name}: character {error.start} is a lone surrogate, not valid Unicode") from error
