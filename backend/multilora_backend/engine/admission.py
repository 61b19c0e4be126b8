# SPDX-License-Identifier: Apache-2.0
"""What the engine refuses at once: only it knows the model's limits, the queue's length, and the adapters."""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from multilora_backend.added_tokens import NO_TOKENS
from multilora_backend.core import Sequence
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.protocol import Retokenise, Submit

if TYPE_CHECKING:
    from multilora_backend.engine.engine import Engine

ANY_ID = 2**31


def admit(engine: Engine, message: Submit) -> str | Retokenise:
    """The key of the request's adapter, empty for none, or how else the prompt is to be tokenised.

    Raises MultiloraError if the request cannot be taken in.
    """
    prompt = len(message.prompt_token_ids)
    if not 1 <= prompt < engine.model.max_model_len:
        limit = engine.model.max_model_len - 1
        raise invalid("text_input", f"must be 1 to {limit} tokens, got {prompt}")
    if message.sampling.n > engine.config.max_n:
        raise invalid("n", f"must be at most max_n, {engine.config.max_n}, got {message.sampling.n}")
    if len(engine.scheduler.waiting) + message.sampling.n > engine.config.max_waiting:
        limit = engine.config.max_waiting
        raise MultiloraError(ErrorCode.UNAVAILABLE, f"too many waiting requests: max_waiting is {limit}")
    adapter = engine.adapters.resolve(message.adapter, message.tenant) if message.adapter else ""
    if (tokens := engine.adapters.tokens(adapter) if adapter else NO_TOKENS).digest != message.tokens_digest:
        return Retokenise(message.request_id, tokens)
    known = engine.adapters.vocabulary(adapter) if adapter else 0
    # Of an adapter that nobody has looked at it is found out before anything runs.
    unread = adapter and not engine.adapters.looked_at(adapter)
    _check_ids(message, ANY_ID if unread else known or engine.card.vocab_size)
    engine.scheduler.check(message.tenant, adapter, message.sampling.n)
    return adapter


def _ids(message: Submit) -> dict[str, Collection[int]]:
    """All that a request names, by field."""
    sampling = message.sampling
    return {
        "text_input": message.prompt_token_ids,
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": sampling.logit_bias or (),
    }


def _check_ids(message: Submit, vocabulary: int) -> None:
    for field, ids in _ids(message).items():
        if ids and (max(ids) >= vocabulary or min(ids) < 0):
            raise invalid(field, f"token ids must be below the vocabulary's {vocabulary}")


def sequences_of(frontend: str, message: Submit, adapter: str, max_model_len: int) -> list[Sequence]:
    """The n sequences of a request; `adapter` is a key."""
    sampling, prompt = message.sampling, message.prompt_token_ids
    seed = random.getrandbits(62) if sampling.seed is None else sampling.seed
    ids_below = 1 + max(max(ids, default=-1) for ids in _ids(message).values())
    return [
        Sequence(
            key=(frontend, message.request_id, index),
            prompt_len=len(prompt),
            token_ids=list(prompt),
            sampling=sampling,
            seed=seed + index,
            adapter=adapter,
            priority=message.priority,
            tenant=message.tenant,
            tokens_digest=message.tokens_digest,
            ids_below=ids_below,
            arrival=time.monotonic(),
            max_len=min(len(prompt) + sampling.max_tokens, max_model_len),
        )
        for index in range(sampling.n)
    ]
