# SPDX-License-Identifier: Apache-2.0
"""The model's tokenizer from its `tokenizers` file: text to ids, and each id to the bytes it stands for.

Bytes per token are what makes incremental decoding linear and exact: see `detokenizer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from multilora_backend.added_tokens import AddedTokens, extended
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.chat import ChatTemplate
from multilora_backend.protocol import ModelCard

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_PROBE = "The quick (brown) fox: 42 naïve, 你好 🎉!  Well...\n\tdone"


class Tokenizer:
    """Safe to use from several threads at once."""

    def __init__(self, card: ModelCard) -> None:
        """Raises MultiloraError(UNSUPPORTED) if a token's text depends on more than whether it comes first."""
        self.digest = ""
        """Of `AddedTokens`."""
        self._hf = HfTokenizer.from_str(card.tokenizer_json.decode("utf-8"))
        # A tokenizer file may carry its training's truncation and padding; a prompt is neither cut nor filled.
        self._hf.no_truncation()
        self._hf.no_padding()
        self._template = ChatTemplate(card.chat_template, card.special_tokens)
        decoders = set(_decoder_types(json.loads(card.tokenizer_json).get("decoder")))
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self.special_ids = self._special_ids()
        self.longest_token = max(map(len, self._hf.get_vocab(with_added_tokens=True)), default=1)
        """Characters of the vocabulary's longest entry: a text has at least len / longest tokens."""
        self._anchor = self._find_anchor()
        self._check()

    def with_tokens(self, added: AddedTokens) -> Tokenizer:
        """One that knows these tokens as well, and shares all else."""
        tokenizer = copy(self)
        tokenizer.digest = added.digest
        tokenizer._hf = extended(self._hf, added)
        tokenizer._pieces = {}
        tokenizer.special_ids = tokenizer._special_ids()
        tokenizer.longest_token = max(self.longest_token, *(len(token.content) for token in added.tokens))
        return tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # The plain `encode` holds the GIL, 0.7 s for 1 MB of text, in which no other request would get its tokens;
        # the batch form lets go of it, and without offsets takes 0.3 to 0.45 s (tokenizers 0.23).
        return list(self._hf.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def render(self, messages: object) -> str:
        """Chat messages as the prompt's text; encode it without special tokens, which the template has written."""
        return self._template.render(messages)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._hf.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """One token on its own, special or not, with U+FFFD for bytes that are no character on their own."""
        return self.piece(token_id, first=False).decode("utf-8", "replace")

    def piece(self, token_id: int, first: bool) -> bytes:
        """What a token adds to a text: UTF-8 bytes, not always whole characters; empty for an unknown id.

        `first` says that no token came before it: many tokenizers drop the space that opens a text.
        """
        piece = self._pieces.get((token_id, first))
        if piece is None:
            piece = self._pieces[token_id, first] = self._make_piece(token_id, first)
        return piece

    def _make_piece(self, token_id: int, first: bool) -> bytes:
        token = self._hf.id_to_token(token_id)
        if token is None:  # models are padded to more ids than the tokenizer has
            return b""
        if self._byte_level:
            return _byte_level(token)
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte:
            return bytes.fromhex(byte[1])
        if first or self._anchor is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        before = self.decode([self._anchor], skip_special_tokens=False)
        return self.decode([self._anchor, token_id], skip_special_tokens=False)[len(before) :].encode()

    def _special_ids(self) -> frozenset[int]:
        return frozenset(id_ for id_, token in self._hf.get_added_tokens_decoder().items() if token.special)

    def _find_anchor(self) -> int | None:
        """An ordinary word or letter, in whose company other tokens show what they add after a first one."""
        for token_id in [*self.encode("a", add_special_tokens=False), *range(self._hf.get_vocab_size())]:
            if token_id not in self.special_ids and self.decode([token_id]).strip().isalnum():
                return token_id
        return None

    def _check(self) -> None:
        ids = self.encode(_PROBE, add_special_tokens=False)
        pieces = b"".join(self.piece(id_, first=i == 0) for i, id_ in enumerate(ids))
        if pieces.decode("utf-8", "replace") != self.decode(ids, skip_special_tokens=False):
            raise MultiloraError(
                ErrorCode.UNSUPPORTED, "tokenizer.json: its decoder is not supported: it does not decode token by token"
            )


def _decoder_types(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _decoder_types(part)


def _alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (Radford et al., GPT-2, 2019): character -> byte.

    Printable Latin-1 stands for itself, and the other bytes, in order, for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF = _alphabet()


def _byte_level(token: str) -> bytes:
    """An added token may hold characters outside the alphabet (a space); it then stands for itself."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()
