# SPDX-License-Identifier: Apache-2.0
"""Activated LoRA (arXiv:2504.12397): an adapter that acts from its invocation tokens on, not on what is before them.

PEFT's rule decides: from the start of the last occurrence in the prompt; nowhere, also not in the output, if the prompt
has none. So K and V before it are the base model's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from multilora_backend.errors import invalid

NEVER = 2**62
"""A position that no sequence reaches."""
MAX_TOKENS = 1024


def invocation_tokens(value: Any) -> tuple[int, ...]:
    """The field of adapter_config.json; empty: a plain LoRA. Raises MultiloraError."""
    if value is None or value == []:
        return ()
    tokens = isinstance(value, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in value)
    if not tokens or len(value) > MAX_TOKENS or not all(0 <= token < 2**31 for token in value):
        raise invalid("alora_invocation_tokens", f"must be a list of at most {MAX_TOKENS} token ids")
    return tuple(value)


def first_active(prompt: Sequence[int], invocation: Sequence[int]) -> int:
    """The first position that the adapter acts on: 0 without invocation tokens, NEVER if the prompt lacks them."""
    if not invocation:
        return 0
    # Bytes are searched at the speed of memory: a prompt of 100,000 tokens in well under a millisecond.
    text, wanted = array("q", prompt), array("q", invocation)
    size, place = text.itemsize, -1
    data, pattern = text.tobytes(), wanted.tobytes()
    stop = len(data)
    while (place := data.rfind(pattern, 0, stop)) >= 0:
        if place % size == 0:
            return place // size
        stop = place + len(pattern) - 1
    return NEVER
