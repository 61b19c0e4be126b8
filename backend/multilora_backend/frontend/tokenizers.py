# SPDX-License-Identifier: Apache-2.0
"""The base model's tokenizer, and those of adapters that have tokens of their own.

Adapters are the engine's: a front end learns an adapter's tokens when the engine hands a request back that was
tokenised by others, and takes them for the adapter's until it hears otherwise. So only the first one is done twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from multilora_backend.added_tokens import AddedTokens
from multilora_backend.frontend.tokenizer import Tokenizer

MAX_NAMES = 4096
"""Adapters, as clients name them, whose tokens are remembered; of others they are asked for anew."""
MAX_TOKENIZERS = 256
"""Different sets of added tokens."""


class Tokenizers:
    """Any thread may call."""

    def __init__(self, base: Tokenizer) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._digests: OrderedDict[str, str] = OrderedDict()
        """By the adapter's name as clients give it. The oldest first, as below."""
        self._own: OrderedDict[str, Tokenizer] = OrderedDict()
        """By the digest of their tokens."""

    def of(self, adapter: str) -> Tokenizer:
        """By what is known of the adapter."""
        with self._lock:
            digest = self._digests.get(adapter)
            return self._own.get(digest, self._base) if digest else self._base

    def learn(self, adapter: str, added: AddedTokens) -> Tokenizer:
        """The tokenizer for an adapter that has these tokens. Raises MultiloraError if there can be none."""
        with self._lock:
            self._digests.pop(adapter, None)
            tokenizer = self._own.get(added.digest, None)
        if not added.tokens:
            return self._base
        tokenizer = tokenizer or self._base.with_tokens(added)  # not under the lock, which every request takes
        with self._lock:
            self._own.pop(added.digest, None)
            self._digests[adapter] = added.digest
            self._own[added.digest] = tokenizer
            for known, limit in ((self._digests, MAX_NAMES), (self._own, MAX_TOKENIZERS)):
                if len(known) > limit:
                    known.popitem(last=False)
            return tokenizer
