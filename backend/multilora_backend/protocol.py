# SPDX-License-Identifier: Apache-2.0
"""Everything the front ends and the engine say to each other, as msgspec structs over ZeroMQ.

A front end is a DEALER, the engine a ROUTER; a message is one msgpack frame. Nothing is pickled.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from multilora_backend.core import FinishReason, SamplingParams
from multilora_backend.errors import ErrorCode


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message of a front end. The engine lives as long as one process that said Hello lives."""

    name: str
    """Unique among the front ends, for logs and keys."""
    pid: int
    server_pid: int
    """tritonserver's: if it dies, its stubs are as good as dead."""


class Submit(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    request_id: int
    """Unique in its front end."""
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: str = ""
    priority: int = 0
    tenant: str = ""


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Ends a request (index -1) or one of its n sequences; unknown ids are ignored, since they may just have ended."""

    request_id: int
    index: int = -1


class Bye(msgspec.Struct, tag=True, frozen=True):
    """The front end is leaving; its requests are aborted."""


FrontendMessage: TypeAlias = Hello | Submit | Abort | Bye


class ModelCard(msgspec.Struct, frozen=True):
    """What a front end must know to validate, tokenise and detokenise without transformers."""

    model: str
    """The folder, as given."""
    max_model_len: int
    """Prompt and output tokens together."""
    vocab_size: int
    eos_token_ids: list[int]
    tokenizer_json: bytes
    """A `tokenizers` file."""
    chat_template: str | None
    special_tokens: dict[str, str]
    """What chat templates may use: bos_token, eos_token, ..."""
    lora_enabled: bool


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The answer to Hello, once the engine can serve."""

    pid: int
    card: ModelCard


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest."""


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one sequence: usually one, more when a step gave more."""

    request_id: int
    index: int
    token_ids: list[int]
    logprobs: list[list[TokenLogprob]] | None = None
    """For each token: the sampled one first, then the likeliest ones."""
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """One step's tokens for one front end."""

    items: list[Output]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A request ended with an error: refused, or its adapter could not be loaded."""

    request_id: int
    code: ErrorCode
    message: str


class Stats(msgspec.Struct, tag=True, frozen=True):
    """The engine's gauges and what happened since the engine's start (totals) or since the last Stats (lists)."""

    num_running: int
    num_waiting: int
    """Including those that wait for an adapter."""
    num_waiting_adapter: int
    kv_cache_usage: float
    """Pages held by running sequences over all pages, 0 to 1."""
    adapters_by_state: dict[str, int]
    max_loras: int
    running_adapters: list[str]
    waiting_adapters: list[str]
    steps_total: int
    preemptions_total: int
    prefix_cache_queries_total: int
    """Prompt tokens looked up in the prefix cache, and found there."""
    prefix_cache_hits_total: int
    adapter_loads_total: int
    adapter_load_failures_total: int
    adapter_evictions_total: int
    adapter_load_seconds: list[float]
    adapters_per_step: dict[int, int]
    """Histogram since the last Stats: number of different adapters in a step -> steps."""
    adapters_per_step_max: int
    """Since the engine's start."""


EngineMessage: TypeAlias = Ready | Outputs | Failed | Stats

encoder = msgspec.msgpack.Encoder()
frontend_decoder: msgspec.msgpack.Decoder[FrontendMessage] = msgspec.msgpack.Decoder(FrontendMessage)
engine_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
