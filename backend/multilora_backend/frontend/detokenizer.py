# SPDX-License-Identifier: Apache-2.0
"""Tokens of one sequence to text that can be sent at once, and the end of the text at a stop string.

A token's bytes (`Tokenizer.piece`) go through an incremental UTF-8 decoder, so a character is sent with its last
byte, at most three bytes are ever waiting, and a byte that fits nowhere becomes U+FFFD as soon as that is certain.
The cost of a token does not depend on how many came before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from multilora_backend.core import SamplingParams
from multilora_backend.frontend.tokenizer import Tokenizer


class Detokenizer:
    """What is pushed and finished adds up to `tokenizer.decode` of all ids, up to a stop string.

    One exception: where a tokenizer with byte fallback meets bytes that are not UTF-8, `decode` replaces the whole
    run of bytes around them, which would take back what was already sent; here only the bad bytes are replaced.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self.stopped: str | None = None
        """The stop string that ended the text; nothing comes after it."""
        self.num_tokens = 0
        """Tokens consumed; less than what was pushed if a stop string ended the text."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if sampling.skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._stop = sampling.stop
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._held = ""
        """Text that may be the beginning of a stop string."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens and returns the text that is now certain. Tokens after a stop are ignored."""
        sent = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            if token_id in self._skipped:
                continue
            piece = self._tokenizer.piece(token_id, self._first)
            self._first = False
            sent.append(self._release(self._utf8.decode(piece)))
        return "".join(sent)

    def finish(self) -> str:
        """Returns what was held back: there will be no more tokens."""
        if self.stopped is not None:
            return ""
        sent = self._release(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return sent + held

    def _release(self, text: str) -> str:
        """Passes new text on, except for a stop string, what follows it, and what may become one.

        The match that is complete first counts, and of those that end together the longest, so the result does not
        depend on how the text came in pieces. Matches that end in the first min_tokens tokens are not looked for.
        """
        if not self._stop or not text:
            return text
        old, text = len(self._held), self._held + text
        self._held = ""
        if self.num_tokens > self._min_tokens:
            matches = [(at + len(s), at, s) for s in self._stop if (at := text.find(s, max(0, old - len(s) + 1))) >= 0]
            if matches:
                end, start, self.stopped = min(matches)
                return text[: end if self._include_stop else start]
        held = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
