# SPDX-License-Identifier: Apache-2.0
"""What goes into a request and what comes out of it, the same for every protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

AdapterChoice = str | Mapping[str, float]
"""The name of an adapter, or several with the weights of their sum: {"a": 0.7, "b": 0.3}, or "a:0.7,b:0.3"."""


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of every generating method; what is left out or None has the server's default.

    Names, meanings and defaults are vLLM's. The server alone checks them, so that a client never disagrees
    with the server it talks to: an unknown name or a bad value raises InvalidRequest with the server's sentence.
    """

    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    """0 is greedy."""
    top_k: int | None
    top_p: float | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    logprobs: int | None
    """How many of the likeliest tokens to report beside the sampled one; any number also turns on
    `Choice.logprobs` and `Choice.cumulative_logprob`."""
    logit_bias: Mapping[int, float] | None
    request_priority: int | None
    """Larger is sooner."""
    tenant: str | None
    """Whose quota and share it is. A server that takes both from headers refuses them here."""


class AdapterInfo(TypedDict):
    """An adapter as the server tells of it; a newer server may tell more."""

    name: str
    key: str
    version: str | None
    """Content hash: `name@version` asks for it, and the first digits will do. None until it has been read."""
    versions: list[str]
    """Others of this name that can still be asked for."""
    current: bool
    pending: bool
    """A new revision is being read or checked, and becomes current if it is found fine."""
    state: str
    """"cold", "loading", "active", "evicting" or "failed"."""
    since_s: float
    reason: str
    level: str
    """"device", "host" or "disk": the fastest memory that has it."""
    rank: int
    bytes: int
    pinned: bool
    aliases: list[str]
    source: str
    origin: str
    """"config" or "admin"."""
    tenants: list[str]
    leases: int
    holds: int
    requests_total: int
    loads_total: int
    load_seconds: float
    last_used_s: float | None
    no_effect: bool


class Message(TypedDict):
    """One turn of a chat; the model's chat template decides which roles exist."""

    role: str
    content: str


@dataclass(frozen=True)
class TokenLogprob:
    logprob: float
    rank: int
    """1 is the likeliest."""
    text: str


@dataclass(frozen=True)
class Choice:
    """One of a request's `n` texts: the whole of it in a Completion, what is new of it in a Chunk."""

    text: str
    finish_reason: str | None
    """"stop" or "length"; None while the text goes on."""
    num_output_tokens: int
    cumulative_logprob: float | None = None
    """Sum over all tokens so far, in a Chunk as well. None unless `logprobs` was asked for."""
    logprobs: tuple[dict[int, TokenLogprob], ...] | None = None
    """For each token, by token id. None unless `logprobs` was asked for."""


@dataclass(frozen=True)
class _Choices:
    """The first choice's fields as properties, since almost every request has just one."""

    choices: tuple[Choice, ...]
    num_input_tokens: int

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def num_output_tokens(self) -> int:
        return self.choices[0].num_output_tokens

    @property
    def cumulative_logprob(self) -> float | None:
        return self.choices[0].cumulative_logprob

    @property
    def logprobs(self) -> tuple[dict[int, TokenLogprob], ...] | None:
        return self.choices[0].logprobs


@dataclass(frozen=True)
class Chunk(_Choices):
    """One response of a stream. A server that lags puts the tokens of several steps into one."""

    final: bool
    """True for the last chunk of the stream."""


@dataclass(frozen=True)
class Completion(_Choices):
    """A whole answer. Times are in seconds on the client's clock, from the first attempt on."""

    adapter: str | None
    """The adapter that was asked for; None for the base model."""
    ttft_s: float | None
    """Time to the first token; None where the whole text came in one response (`generate` over gRPC)."""
    total_s: float
