# SPDX-License-Identifier: Apache-2.0
"""Everything the front ends and the engine say to each other, as msgspec structs over ZeroMQ.

A front end is a DEALER, the engine a ROUTER; a message is one msgpack frame. Nothing is pickled.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from multilora_backend.added_tokens import AddedTokens
from multilora_backend.core import FinishReason, SamplingParams
from multilora_backend.errors import ErrorCode


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message of a front end. The engine lives as long as one process that said Hello lives."""

    name: str
    """Unique among the front ends, for logs and keys."""
    pid: int
    server_pid: int
    """tritonserver's: if it dies, its stubs are as good as dead."""
    serves: bool = True
    """False for one that only administers: the engine does not live on for its sake, nor tells it statistics."""


class Submit(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    request_id: int
    """Unique in its front end."""
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: str = ""
    priority: int = 0
    tenant: str = ""
    tokens_digest: str = ""
    """Of the `AddedTokens` with which the prompt was tokenised."""


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Ends a request (index -1) or one of its n sequences; unknown ids are ignored, since they may just have ended."""

    request_id: int
    index: int = -1


class Bye(msgspec.Struct, tag=True, frozen=True):
    """The front end is leaving; its requests are aborted."""


class AdapterArguments(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What an `AdapterCommand` may carry; which of these an action takes is in `frontend.commands`."""

    name: str = ""
    """Of an adapter; where an action takes existing ones, also an alias or name@version."""
    source: str = ""
    """Where to find it, see `adapters.sources`; empty: the folder of that name among the configured adapters."""
    version: str = ""
    """The content hash that must be found there; empty: any."""
    pinned: bool = False
    tenants: tuple[str, ...] = ()
    """Who may use it; empty: everybody."""
    alias: str = ""
    target: str = ""
    """What the alias stands for from now on: a name or name@version."""
    prefix: str = ""
    state: str = ""
    offset: int = 0
    limit: int = 250
    """`list`: so many adapters, in order of name."""
    wait: bool = True
    """Answer when it is done, not when it has begun."""
    timeout_s: float = 60.0
    """With `wait`: answer after this long in any case."""


class AdapterCommand(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """Something that an operator wants done or told about adapters; answered by AdapterReply or Failed."""

    request_id: int
    """Unique in its front end."""
    action: str
    arguments: AdapterArguments = AdapterArguments()
    token: str = ""


FrontendMessage: TypeAlias = Hello | Submit | Abort | AdapterCommand | Bye


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
    """A request or an adapter command ended with an error: refused, or its adapter could not be loaded."""

    request_id: int
    code: ErrorCode
    message: str


class Retokenise(msgspec.Struct, tag=True, frozen=True):
    """The engine does not have the request: its adapter's tokens are these. It is to come again, tokenised so."""

    request_id: int
    tokens: AddedTokens


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One revision of an adapter, as an operator sees it. Counts are this revision's, times seconds."""

    name: str
    key: str
    """The name, or name@2, name@3, ... for revisions that replaced others: unique as long as the engine lives."""
    version: str | None
    """Content hash, which `name@version` addresses; None until it has been read."""
    versions: list[str]
    """Of the other revisions of this name that can still be addressed."""
    current: bool
    """What requests for the name get; otherwise it serves those that began with it, or that name its version."""
    pending: bool = False
    """A new revision is being read or checked, and becomes current if it is found fine."""
    state: str
    """"cold", "loading", "active", "evicting" or "failed"."""
    since_s: float
    """How long it has been in this state."""
    reason: str
    """Why it is FAILED, or why its successor or its pin was refused; empty otherwise."""
    history: list[tuple[float, str, str]]
    """The last changes of state, the oldest first: seconds ago, state, reason."""
    level: str
    """The fastest memory that has all of it: "device", "host" or "disk"."""
    rank: int
    """0 while unknown."""
    bytes: int
    """On the host, in device layout; 0 while unknown."""
    pinned: bool
    aliases: list[str]
    """That lead here, to the name or to this version."""
    source: str
    origin: str
    """"config": from the configured folder or file; "admin": by a command."""
    tenants: list[str]
    """Patterns of who may use it; empty: everybody."""
    leases: int
    """Sequences that run with it."""
    holds: int
    """Sequences between submission and end."""
    requests_total: int
    loads_total: int
    load_seconds: float
    """Of the last load, from its request until ACTIVE; 0 if there was none."""
    last_used_s: float | None
    """How long ago a sequence last took or gave back a lease; None: never."""
    no_effect: bool
    """All of its deltas are zero."""


class Resident(msgspec.Struct, frozen=True, array_like=True):
    """An adapter revision whose weights are in memory, or, at level "", are no longer."""

    key: str
    level: str
    """"device" or, if only the host has it, "host"."""
    rank: int = 0
    pinned: bool = False


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
    """Prompt tokens looked up in the prefix cache, and found there; once a sequence, when it first runs."""
    prefix_cache_hits_total: int
    adapter_loads_total: int
    adapter_load_failures_total: int
    adapter_evictions_total: int
    adapter_load_seconds: list[float]
    adapters_per_step: dict[int, int]
    """Histogram since the last Stats: number of different adapters in a step -> steps."""
    adapters_per_step_max: int
    """Since the engine's start."""
    adapter_arrivals: dict[str, int] = {}
    """Totals: sequences by where their adapter was when they came: "device", "host", "disk"."""
    adapter_wait_seconds: list[float] = []
    """Of sequences that began to run and came before their adapter: from then until it was on the device."""
    pauses_total: int = 0
    """Sequences that were stopped, with their pages, since their adapter gave its slot up."""
    handovers_total: int = 0
    """Slots that adapters gave up to overdue ones."""
    num_paused: int = 0
    """Of those that wait: with pages."""
    residents: list[Resident] = []
    """What has changed since the last Stats, or, if `residents_complete`, all: 10,000 names are never gone through."""
    residents_complete: bool = False
    max_resident: int = 0
    """Adapters that the device pool would hold at the mean rank of those that it holds."""
    adapter_bytes: dict[str, tuple[int, int]] = {}
    """By level, "device" and "host": bytes taken and the budget."""
    block_size: int = 0
    num_kv_pages: int = 0
    """That sequences can have."""


class AdapterReply(msgspec.Struct, tag=True, frozen=True):
    """What became of an `AdapterCommand`. Of the error, if there is one, tells `Failed`."""

    request_id: int
    result: dict[str, Any]
    """Plain JSON, as an operator reads it; see docs/adapters.md, Administration."""


EngineMessage: TypeAlias = Ready | Outputs | Failed | Retokenise | Stats | AdapterReply

encoder = msgspec.msgpack.Encoder()
frontend_decoder: msgspec.msgpack.Decoder[FrontendMessage] = msgspec.msgpack.Decoder(FrontendMessage)
engine_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
