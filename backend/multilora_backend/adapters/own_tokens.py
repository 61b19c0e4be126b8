# SPDX-License-Identifier: Apache-2.0
"""The tokens that an adapter's folder adds to the base model's tokenizer.

Trainers save the whole tokenizer beside an adapter. Of it only the added tokens are read: the rest is the base model's,
or the adapter would not be one for it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from multilora_backend.added_tokens import AddedToken, AddedTokens, extended
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

TOKENIZER = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 * 2**20


class _File(msgspec.Struct):
    """Decoding this takes 7 ms of a file of 128k tokens, where all of it takes 280."""

    added_tokens: list[AddedToken] | None = None


def read_tokens(path: Path, base: Tokenizer, vocabulary: int) -> AddedTokens:
    """`vocabulary`: rows of the adapter's embedding.

    Raises MultiloraError for a token that is another one in the base model's tokenizer, that has no row, or that
    cannot be added under its number.
    """
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise invalid(TOKENIZER, f"is larger than {MAX_TOKENIZER_BYTES} bytes")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File).added_tokens or []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(TOKENIZER, f"is not a tokenizer's file: {error}") from error
    known = {token.content for token in base.get_added_tokens_decoder().values()}
    for token in found:
        number = base.token_to_id(token.content)
        if number not in (None, token.id):
            raise MultiloraError(
                ErrorCode.UNSUPPORTED,
                f"{TOKENIZER}: token {token.content!r} has id {token.id}, and {number} in the base model's",
            )
    own = AddedTokens.of(token for token in found if token.content not in known)
    for token in own.tokens:
        if not 0 <= token.id < vocabulary:
            raise invalid(TOKENIZER, f"token {token.content!r}: its id must be below {vocabulary}, got {token.id}")
    if own.tokens:
        extended(base, own)
    return own
