# SPDX-License-Identifier: Apache-2.0
"""KV pages of sequences that do not run, in host memory: who has which place there, and whether moving pays.

Pure bookkeeping. A move is planned here and carried out by `engine.host_pages` before the step that it was planned
with, in the order of planning: what is freed by one move may be overwritten by the next.
"""

from __future__ import annotations

from multilora_backend.core import PageMove, Sequence

PREFILL_TOKENS_PER_S = 42_000.0
"""An 8B model on one H200: 2,048 rows in 48.4 ms, docs/performance.md."""
COPY_BYTES_PER_S = 50e9
"""PCIe 5 x16 with pinned memory, each way."""
OVERHEAD_S = 1.5e-3
"""Launches and index copies of a sequence's way there and back."""


def moving_pays(num_tokens: int, bytes_per_token: int) -> bool:
    """Whether the way to the host and back takes less than computing the tokens again.

    For Llama-3.1-8B (128 KiB a token) it is 5.2 us a token against 24, so it pays from 81 tokens on.
    """
    way = OVERHEAD_S + 2 * num_tokens * bytes_per_token / COPY_BYTES_PER_S
    return way < num_tokens / PREFILL_TOKENS_PER_S


class HostPages:
    def __init__(self, num_pages: int, bytes_per_token: int) -> None:
        """No pages: nothing is ever moved."""
        self.num_pages = num_pages
        self.moved = 0
        """Sequences whose pages went to the host."""
        self._bytes_per_token = bytes_per_token
        self._used = 0
        self._free: list[int] = []
        """Places that were used before; those from `_used` on never were."""
        self._moves: list[PageMove] = []

    @property
    def num_free(self) -> int:
        return self.num_pages - self._used + len(self._free)

    def take_in(self, sequence: Sequence, page_size: int) -> bool:
        """Plans to keep what the sequence has computed; False if it does not pay or there is no room."""
        count = -(-sequence.num_computed // page_size)
        if count > self.num_free or not moving_pays(sequence.num_computed, self._bytes_per_token):
            return False
        reused = min(count, len(self._free))
        fresh = range(self._used, self._used + count - reused)
        places = [self._free.pop() for _ in range(reused)] + list(fresh)
        self._used += len(fresh)
        sequence.host_pages, sequence.host_computed = places, sequence.num_computed
        self._moves.append(PageMove(tuple(sequence.pages[:count]), tuple(places), to_host=True))
        self.moved += 1
        return True

    def give_back(self, sequence: Sequence, page_size: int) -> None:
        """Plans to fill the sequence's device pages, but for those that it has computed or found in the cache."""
        first = sequence.num_computed // page_size
        places = sequence.host_pages
        if first < len(places):
            pages = tuple(sequence.pages[first : len(places)])
            self._moves.append(PageMove(pages, tuple(places[first:]), to_host=False))
            sequence.num_computed = sequence.host_computed
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """What the host has of the sequence is not needed any more."""
        self._free += sequence.host_pages
        sequence.host_pages, sequence.host_computed = [], 0

    def take_moves(self) -> tuple[PageMove, ...]:
        moves, self._moves = self._moves, []
        return tuple(moves)
