# SPDX-License-Identifier: Apache-2.0
"""Whose KV pages go when there are too few: those of paused sequences before those of running ones.

They go to the host where that is cheaper than to compute them again (`scheduling.host`) and there is room.
"""

from __future__ import annotations

from multilora_backend.core import Sequence, SequenceStatus
from multilora_backend.scheduling.host import HostPages
from multilora_backend.scheduling.lines import Key
from multilora_backend.scheduling.pages import PageTable


class Memory:
    """The page table, and the sequences that hold pages without using them."""

    def __init__(self, pages: PageTable, host: HostPages) -> None:
        self.host = host
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

    def admit(self, sequence: Sequence) -> None:
        """What the prefix cache has for a sequence without pages."""
        if not sequence.pages:
            self._pages.admit(sequence, sequence.root)

    def bring_back(self, sequence: Sequence) -> None:
        """What the host has, into pages that the sequence has got."""
        if sequence.host_pages:
            self.host.give_back(sequence, self._pages.page_size)

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended, or what was computed of it cannot be used again."""
        self._pages.release(sequence)
        self.host.forget(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Another version of the adapter has computed the pages of a sequence that is about to run."""
        self.paused.pop(sequence.key, None)
        self.release(sequence)
        if sequence.status is not SequenceStatus.WAITING:
            sequence.transition(SequenceStatus.WAITING)

    def take_back(self, sequence: Sequence) -> None:
        """The pages of a sequence that does not run are needed: they move to the host, or are computed again later."""
        self.paused.pop(sequence.key, None)
        kept = self.host.take_in(sequence, self._pages.page_size)
        self._pages.release(sequence)
        sequence.setbacks = 0 if kept or sequence.num_tokens > sequence.start_len else sequence.setbacks + 1
        if sequence.status is not SequenceStatus.WAITING:
            sequence.transition(SequenceStatus.WAITING)
        self.losses += 1
