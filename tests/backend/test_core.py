# SPDX-License-Identifier: Apache-2.0
"""The life of a sequence has one table, and errors say in words what Triton drops."""

from __future__ import annotations

import itertools

import pytest

from multilora_backend.core import FinishReason, SamplingParams, Sequence, SequenceStatus
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

W, A, R, P, F = SequenceStatus
LEGAL = {(W, A), (W, R), (W, F), (A, W), (A, R), (A, F), (R, W), (R, P), (R, F), (P, W), (P, R), (P, F)}


@pytest.mark.parametrize(("before", "after"), [*itertools.product(SequenceStatus, repeat=2)])
def test_transitions(before: SequenceStatus, after: SequenceStatus):
    sequence = Sequence(("t", 0, 0), 1, [1], SamplingParams(), 0)
    sequence.status = before
    reason = FinishReason.STOP if after is F else None
    if (before, after) in LEGAL:
        sequence.transition(after, reason)
        assert sequence.status is after
        assert sequence.finished == (after is F)
    else:
        with pytest.raises(RuntimeError, match="illegal transition"):
            sequence.transition(after, reason)


def test_a_reason_belongs_to_the_end():
    sequence = Sequence(("t", 0, 0), 1, [1], SamplingParams(), 0)
    with pytest.raises(RuntimeError, match="finish reason"):
        sequence.transition(F)
    with pytest.raises(RuntimeError, match="finish reason"):
        sequence.transition(R, FinishReason.STOP)


def test_error_texts():
    assert invalid("top_p", "must be in (0, 1]").text == "top_p: must be in (0, 1]"
    assert MultiloraError(ErrorCode.UNAVAILABLE, "no engine").text == "unavailable: no engine"
    assert MultiloraError(ErrorCode.INTERNAL, "no luck").text == "internal: no luck"
