# SPDX-License-Identifier: Apache-2.0
"""The nouns: what a request asks for, what a sequence is, what one step does, where LoRA acts.

Everything here is plain data without torch, so that the front end, the scheduler and their tests share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

import msgspec

UNKNOWN_TOKEN = -1
"""Stands in `Sequence.token_ids` for a token that the device has drawn, or will, and the host has not read yet."""

if TYPE_CHECKING:
    from multilora_backend.adapters.state import Lease
    from multilora_backend.scheduling.lines import Line


COMPOSED = "__composed__"
"""The name of all compositions of adapters in reports and in fairness: there is no end of them."""


def adapter_name(key: str) -> str:
    """The name behind a key, for tenants, fairness and reports; empty for the base model.

    A key stands for one revision of an adapter: the name itself for the first, `name@2`, `name@3`, ... for those that
    replaced it. No name contains "@". A request may also name several, with weights; see `composition`.
    """
    return COMPOSED if ":" in key else key.partition("@")[0]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose tokens. Names, defaults and meanings are vLLM's; ranges are checked in `frontend.sampling`.

    The front end uses the fields about text (`stop`, `include_stop_str_in_output`, `skip_special_tokens`),
    the engine all others.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 (or -1 from a client) keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the sampled one; None reports nothing."""
    logit_bias: dict[int, float] | None = None


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SequenceStatus(IntEnum):
    """Ordered: everything from FINISHED on is terminal."""

    WAITING = 0
    WAITING_ADAPTER = 1
    RUNNING = 2
    PAUSED = 3
    """Turned out so that others get its adapter's slot; it may still hold its pages, see `scheduling.scheduler`."""
    FINISHED = 4


_LEGAL: dict[SequenceStatus, frozenset[SequenceStatus]] = {
    SequenceStatus.WAITING: frozenset(
        {SequenceStatus.WAITING_ADAPTER, SequenceStatus.RUNNING, SequenceStatus.FINISHED}
    ),
    SequenceStatus.WAITING_ADAPTER: frozenset(
        {SequenceStatus.WAITING, SequenceStatus.RUNNING, SequenceStatus.FINISHED}
    ),
    # RUNNING -> WAITING is preemption: pages are given back and the sequence is computed again later.
    SequenceStatus.RUNNING: frozenset({SequenceStatus.WAITING, SequenceStatus.PAUSED, SequenceStatus.FINISHED}),
    # PAUSED -> WAITING: its pages were needed.
    SequenceStatus.PAUSED: frozenset({SequenceStatus.WAITING, SequenceStatus.RUNNING, SequenceStatus.FINISHED}),
    SequenceStatus.FINISHED: frozenset(),
}


@dataclass(eq=False, slots=True)
class Sequence:
    """One stream of tokens: a request with n > 1 is n sequences. Owned by the engine's thread alone."""

    key: tuple[str, int, int]
    """(front end, request id, index among the request's n sequences): unique in an engine."""
    prompt_len: int
    token_ids: list[int]
    """The prompt, then what was sampled; the newest may be UNKNOWN_TOKEN while its step is under way."""
    sampling: SamplingParams
    seed: int
    """Drives this sequence's sampling whatever else is in the batch: the request's seed + index, or random."""
    adapter: str = ""
    """Key of an adapter's revision, see `adapter_name`; empty for the base model."""
    priority: int = 0
    """Larger is sooner."""
    tenant: str = ""
    arrival: float = 0.0
    """time.monotonic() when the engine received it."""
    max_len: int = 1 << 31
    """Prompt and output tokens at which the sequence ends."""
    tokens_digest: str = ""
    """Of the `AddedTokens` with which the prompt was tokenised; empty: the base model's tokenizer."""
    ids_below: int = 0
    """One more than the largest token id that the request names, in its prompt or for its sampling."""
    deadline: float = math.inf
    """When the first token should be there, on the clock of `arrival`; the scheduler fills in its class's."""

    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    lease: Lease | None = field(default=None, init=False)
    """Set by the scheduler while RUNNING with an adapter: this adapter version cannot be evicted."""
    pages: list[int] = field(default_factory=list, init=False)
    """Set by the scheduler: KV pages in order of position."""
    num_computed: int = field(default=0, init=False)
    """Tokens whose K and V are in `pages`, counted when they are scheduled."""
    num_cached: int = field(default=0, init=False)
    """Prompt tokens found in the prefix cache when the sequence was last admitted."""
    page_hashes: list[bytes] = field(default_factory=list, init=False)
    """Set by the page table: chain hashes of the full pages, see `scheduling.pages`."""
    num_published: int = field(default=0, init=False)
    """Set by the page table: how many of the pages other sequences can find."""
    root: bytes = field(default=b"", init=False)
    """Set by the scheduler: the adapter version that K and V in `pages` depend on; empty for the base model."""
    adapter_start: int = field(default=0, init=False)
    """Set by the scheduler: the first position that the adapter acts on; before it, K and V are the base model's."""
    line: Line | None = field(default=None, init=False)
    """Set by the scheduler from `add` to `finish`: where the sequence waits, and who pays for it."""
    started: float | None = field(default=None, init=False)
    """Set by the scheduler: when the sequence first ran."""
    start_len: int = field(default=0, init=False)
    """Set by the scheduler: tokens that it had when it last began to run."""
    host_pages: list[int] = field(default_factory=list, init=False)
    """Set by the scheduler: where its pages are in host memory, while they are not on the device."""
    host_computed: int = field(default=0, init=False)
    """Set by the scheduler: tokens whose K and V are there."""
    setbacks: int = field(default=0, init=False)
    """Set by the scheduler: how often in a row it lost its pages before it had sampled a token."""
    cumulative_logprob: float = field(default=0.0, init=False)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def complete(self) -> bool:
        """True if its last token is there or on its way: nothing is left to compute."""
        return len(self.token_ids) >= self.max_len

    @property
    def finished(self) -> bool:
        return self.status >= SequenceStatus.FINISHED

    def transition(self, to: SequenceStatus, reason: FinishReason | None = None) -> None:
        """The only way to change `status`. Raises RuntimeError on a transition that is not in the table."""
        if to not in _LEGAL[self.status]:
            raise RuntimeError(f"sequence {self.key}: illegal transition {self.status.name} -> {to.name}")
        if (to is SequenceStatus.FINISHED) != (reason is not None):
            raise RuntimeError(f"sequence {self.key}: a finish reason belongs to FINISHED and only to it")
        self.status = to
        self.finish_reason = reason


class Slot(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A sequence's share of one step: positions [start, start + count) are computed.

    A Struct, since a step has one for every sequence: it is built in a quarter of a dataclass's time, and what the
    collector does not look at (no sequence leads to a slot) does not call it either.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """True if the last position is the sequence's newest token, so that its logits give the next one."""


class PageMove(msgspec.Struct, frozen=True):
    """KV pages that go to places in host memory or come from there, all layers of each."""

    pages: tuple[int, ...]
    places: tuple[int, ...]
    to_host: bool


@dataclass(frozen=True)
class StepPlan:
    """What one step computes. Slots are in admission order; the model runner may sort rows as it likes."""

    slots: tuple[Slot, ...]
    preempted: tuple[Sequence, ...] = ()
    moves: tuple[PageMove, ...] = ()
    """To be carried out before the step, in this order, even if it has no slots."""

    @property
    def num_tokens(self) -> int:
        return sum(slot.count for slot in self.slots)

    @property
    def adapters(self) -> set[str]:
        """Names of the different adapters in this step, base traffic not counted."""
        return {slot.sequence.adapter for slot in self.slots if slot.sequence.adapter}


@dataclass(frozen=True)
class LoraSite:
    """Weights of the running model that LoRA may act on: q/k/v and gate/up are one site of several slices.

    An adapter's A is one block of `slices * padded(rank)` rows of in_features, slice after slice, and its B
    `[padded(rank), sum(out_features)]`, already multiplied by the scale; rows beyond its rank are zero. With experts,
    both have as many such blocks, one expert after the other.
    """

    key: str
    """Unique in the model, e.g. `model.layers.0.self_attn.qkv_proj`."""
    in_features: int
    modules: tuple[str, ...]
    """Names of the slices' modules in the unfused transformers model, as PEFT's tensor names have them."""
    out_features: tuple[int, ...]
    """Width of each slice, same order as `modules`."""
    parameter: str = ""
    """Name of the parameter for PEFT's target_parameters; empty: the modules are linears, for its target_modules."""
    experts: int = 0
    """Linears of this shape in the one parameter, of which each row takes a few; 0: a linear that every row takes."""
    former: tuple[str, ...] = ()
    """Linears of each expert that transformers 4 had in the parameter's place, with `{}` for the expert's number."""

    @property
    def rank_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What one rank takes of A and of B, each as (rows, columns)."""
        copies = max(self.experts, 1)
        return (copies * len(self.modules), self.in_features), (copies, self.width)

    @property
    def width(self) -> int:
        return sum(self.out_features)
