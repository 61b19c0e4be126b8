# SPDX-License-Identifier: Apache-2.0
"""A sampled token becomes the sequence's newest, and what the front end is told of it."""

from __future__ import annotations

from collections.abc import Collection

from multilora_backend.core import FinishReason, Slot
from multilora_backend.engine.sampler import Sampled
from multilora_backend.protocol import Output


def output_of(slot: Slot, sampled: Sampled, eos_token_ids: Collection[int]) -> Output:
    """Puts the token where UNKNOWN_TOKEN was, and says whether the sequence ends with it; the caller ends it."""
    sequence, end = slot.sequence, slot.start + slot.count
    sequence.token_ids[end] = sampled.token_id
    if sampled.logprob is not None:
        sequence.cumulative_logprob += sampled.logprob
    _, request_id, index = sequence.key
    sampling, token_id = sequence.sampling, sampled.token_id
    reason = FinishReason.LENGTH if end + 1 >= sequence.max_len else None
    # Before min_tokens the sampler cannot draw any of these.
    if token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos):
        reason = FinishReason.STOP
    return Output(
        request_id=request_id,
        index=index,
        token_ids=[token_id],
        logprobs=None if sampled.top is None else [sampled.top],
        cumulative_logprob=sequence.cumulative_logprob,
        finish_reason=reason,
    )
