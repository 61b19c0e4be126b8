# SPDX-License-Identifier: Apache-2.0
"""What the engine refuses at once: only it knows the model's limits, the queue's length, and the adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.protocol import Submit

if TYPE_CHECKING:
    from multilora_backend.engine.engine import Engine


def check_submit(engine: Engine, message: Submit) -> None:
    """Raises MultiloraError if the request cannot be taken in."""
    prompt = len(message.prompt_token_ids)
    if not 1 <= prompt < engine.model.max_model_len:
        limit = engine.model.max_model_len - 1
        raise invalid("text_input", f"must be 1 to {limit} tokens, got {prompt}")
    vocab_size = engine.card.vocab_size
    if max(message.prompt_token_ids) >= vocab_size or min(message.prompt_token_ids) < 0:
        raise invalid("text_input", f"token ids must be below the vocabulary's {vocab_size}")
    if len(engine.scheduler.waiting) + message.sampling.n > engine.config.max_waiting:
        limit = engine.config.max_waiting
        raise MultiloraError(ErrorCode.UNAVAILABLE, f"too many waiting requests: max_waiting is {limit}")
    if message.adapter:
        engine.adapters.check(message.adapter)
