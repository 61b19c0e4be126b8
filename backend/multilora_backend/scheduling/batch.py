# SPDX-License-Identifier: Apache-2.0
"""The running sequences of a step: who is served first, and what a share of the step is."""

from __future__ import annotations

from collections.abc import Iterable

from multilora_backend.core import Sequence, Slot
from multilora_backend.scheduling.lines import line_of


def in_order(running: Iterable[Sequence], *, by_class: bool) -> list[Sequence]:
    """The first to be served first, the last to be preempted first: those that decode, then by class, then as given.

    Without those whose last token is on its way: nothing is left to compute, and their pages come back anyway.
    """
    decoding: list[Sequence] = []
    prompts: list[Sequence] = []
    for sequence in running:
        length = len(sequence.token_ids)
        if length < sequence.max_len:
            (prompts if length - sequence.num_computed > 1 else decoding).append(sequence)
    if by_class:
        decoding.sort(key=_weight, reverse=True)
        prompts.sort(key=_weight, reverse=True)
    return decoding + prompts


def advance(sequence: Sequence, count: int) -> Slot:
    """Counts the sequence's next `count` tokens as computed, and the token that it samples then as its line's."""
    start = sequence.num_computed
    sequence.num_computed = end = start + count
    samples = end == len(sequence.token_ids)
    if samples:
        line_of(sequence).sampled += 1
    return Slot(sequence, start, count, samples)


def _weight(sequence: Sequence) -> float:
    return line_of(sequence).sla.weight
