# SPDX-License-Identifier: Apache-2.0
"""The running sequences of a step: who is served first, and what a share of the step is."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from multilora_backend.core import Sequence, Slot
from multilora_backend.scheduling.lines import line_of
from multilora_backend.scheduling.pages import PageTable

SETBACKS = 2
"""So often a sequence may lose its pages before it has sampled a token."""


def decode(running: Collection[Sequence], pages: PageTable, slots: list[Slot]) -> Collection[Sequence]:
    """Plans a token of every sequence that decodes if there are pages for all; returns what is left to plan.

    Then their order does not matter. There are tokens for all: nothing is admitted without one of its own. One pass,
    since with hundreds of sequences it is most of what a step costs the host.
    """
    size = pages.page_size
    if pages.num_free < len(running):
        needy = sum(len(sequence.token_ids) > len(sequence.pages) * size for sequence in running)
        if needy > pages.num_free:
            return running
    rest: list[Sequence] = []
    for sequence in running:
        length = len(sequence.token_ids)
        start = sequence.num_computed
        if length >= sequence.max_len or length - start != 1:
            rest.append(sequence)
            continue
        if length > len(sequence.pages) * size:
            pages.extend(sequence, length)
        sequence.num_computed = length
        sequence.line.sampled += 1  # type: ignore[union-attr]
        slots.append(Slot(sequence, start, 1, True))
    return rest


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


def take_victim(queue: list[Sequence], at: int) -> Sequence | None:
    """Takes the sequence out of `queue[at:]` that loses its pages; None if there is none that may.

    The last one, but for those that have lost them too often without having sampled anything in between: in the end
    they get on, however much there is of what comes before them in the order.
    """
    for index in range(len(queue) - 1, at - 1, -1):
        if queue[index].setbacks < SETBACKS:
            return queue.pop(index)
    return None


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
