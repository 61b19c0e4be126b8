# SPDX-License-Identifier: Apache-2.0
"""What the layers of the running step may ask for: one module-level context, entered around a forward pass.

transformers' model around our layers stays as it is because of it: attention and LoRA find their metadata here and not
in keyword arguments threaded through every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from multilora_backend.models.attention import AttentionBackend
    from multilora_backend.models.lora import LoraStrategy


@dataclass
class StepContext:
    """Attention and LoRA are planned for the step before it is entered."""

    attention: AttentionBackend
    lora: LoraStrategy
    write_slots: Tensor
    """int32 [T]: where the K and V of each row go, page * page_size + offset."""
    query: Tensor | None = None
    """`[T, heads, head_dim]` for the queries of every layer, if they must lie at a fixed address."""
    logits: Tensor | None = None
    """`[samples, vocab]` for the head's result, if it must lie at a fixed address. The model may change it later on."""
    residual: Tensor | None = field(default=None, init=False)
    """The residual stream `[T, hidden]` between two layers: a layer hands on the normed hidden states."""


_current: StepContext | None = None


@contextmanager
def step(context: StepContext) -> Iterator[None]:
    """Makes `context` current. Steps do not nest."""
    global _current
    if _current is not None:
        raise RuntimeError("a step is running already")
    _current = context
    try:
        yield
    finally:
        _current = None
        context.residual = None


def current() -> StepContext:
    if _current is None:
        raise RuntimeError("no step is running: the model was called outside of the engine's step")
    return _current
