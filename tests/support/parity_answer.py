# SPDX-License-Identifier: Apache-2.0
"""What an engine said to a request of the parity suite, and in whose company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_models import Request


@dataclass
class Answer:
    prompt: list[int]
    asked: str
    token_ids: list[int] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)
    """What each of them was drawn from."""
    every: dict[int, Tensor] = field(default_factory=dict)
    """Logits by position, if they were kept."""
    chunks: int = 0
    """Steps that its prompt took."""
    beside: set[str] = field(default_factory=set)
    """What others asked for that had rows in its steps."""
    failed: str = ""


def answer_of(request: Request) -> Answer:
    sampled = [request.rows[i] for i in range(len(request.token_ids))]
    return Answer(request.prompt, request.adapter, request.token_ids, sampled)


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """Rows of steps that differ in width, by who shares them."""
    width = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, width - len(row)), value=-torch.inf) for row in rows])
