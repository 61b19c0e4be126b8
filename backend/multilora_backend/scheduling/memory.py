# SPDX-License-Identifier: Apache-2.0
"""Whose KV pages go when there are too few: those of paused sequences before those of running ones."""

from __future__ import annotations

from multilora_backend.core import Sequence, SequenceStatus
from multilora_backend.scheduling.lines import Key
from multilora_backend.scheduling.pages import PageTable


class Memory:
    """The page table, and the sequences that hold pages without using them."""

    def __init__(self, pages: PageTable) -> None:
        self.paused: dict[Key, Sequence] = {}
        """Oldest pause first."""
        self.losses = 0
        self._pages = pages

    def extend(self, sequence: Sequence, num_tokens: int, *, take_back: bool) -> bool:
        """Pages for the sequence's first `num_tokens` tokens, with `take_back` also those of paused sequences."""
        while not self._pages.extend(sequence, num_tokens):
            if not take_back or not self.take_back_newest(spare=sequence):
                return False
        return True

    def take_back_newest(self, spare: Sequence | None = None) -> bool:
        """Frees the pages of a paused sequence; false if there is none. The newest pause is the last to go on."""
        for sequence in reversed(self.paused.values()):
            if sequence is not spare:
                self.take_back(sequence)
                return True
        return False

    def take_back(self, sequence: Sequence) -> None:
        """What becomes of a sequence that does not run and whose pages are needed: it is computed again later.

        That is decided here and nowhere else: to move its pages to the host instead, this is the place.
        """
        self.paused.pop(sequence.key, None)
        self._pages.release(sequence)
        if sequence.status is not SequenceStatus.WAITING:
            sequence.transition(SequenceStatus.WAITING)
        self.losses += 1
