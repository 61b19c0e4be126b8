# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter's folder brings a tokenizer that knows more tokens than the base model's.

Prompts are tokenised by the base model's tokenizer. It would cut the text of an added token to pieces, and the adapter
would read what it was never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from multilora_backend.errors import ErrorCode, MultiloraError, invalid

TOKENIZER = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 * 2**20


def check_tokens(path: Path, token_id: Callable[[str], int | None]) -> None:
    """Raises MultiloraError that names a token of the file that the base model's tokenizer does not know so."""
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise invalid(TOKENIZER, f"is larger than {MAX_TOKENIZER_BYTES} bytes")
    try:
        added = json.loads(path.read_bytes()).get("added_tokens") or []
        tokens = [(str(entry["content"]), int(entry["id"])) for entry in added]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise invalid(TOKENIZER, f"is not a tokenizer's file: {error}") from error
    for content, number in tokens:
        if token_id(content) != number:
            raise MultiloraError(
                ErrorCode.UNSUPPORTED,
                f"{TOKENIZER}: token {content!r} ({number}) is not the base model's, whose tokenizer reads prompts; "
                "take the file out of the folder if prompts and outputs do without it",
            )
