# SPDX-License-Identifier: Apache-2.0
"""What adapters must know of the running base model besides where LoRA may act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tokenizers import Tokenizer
from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""Names of the two modules that have a row for every token, in all models that are served."""


class BaseLinear(Protocol):
    """The linear of one site, without any adapter."""

    @property
    def base_weight(self) -> Tensor:
        """[width, in_features], slice after slice, where and as the model runs it."""
        ...

    @property
    def base_bias(self) -> Tensor | None:
        """[width], or None if the site's modules have none."""
        ...


@dataclass(frozen=True, eq=False)
class BaseModel:
    """Weights may be on the meta device where adapters are only checked."""

    linears: Mapping[int, BaseLinear]
    """By the site's index; experts have none."""
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    """Weight [width] of each norm, by the module's name in transformers' model."""
    embedding: Tensor | None = None
    """[vocabulary, hidden]; None if nothing is known of it."""
    head: Tensor | None = None
    """[vocabulary, hidden], likewise."""
    tokenizer: Tokenizer | None = None
    """The base model's; None: adapters with tokens of their own are taken as they are, as nobody sends them text."""

    @property
    def tied(self) -> bool:
        """The head's weight is the embedding's."""
        return self.head is not None and self.head is self.embedding
