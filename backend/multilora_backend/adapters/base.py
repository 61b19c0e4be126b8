# SPDX-License-Identifier: Apache-2.0
"""What adapters must know of the running base model besides where LoRA may act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer
from torch import Tensor

from multilora_backend.adapters.base_files import base_fingerprint

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
class BaseIdentity:
    """By what an adapter may have recorded which model it was trained on."""

    class_name: str
    """Of transformers, as LlamaForCausalLM."""
    settings: Mapping[str, Any]
    """As in config.json."""
    folder: Path

    @cached_property
    def fingerprint(self) -> str:
        """Raises MultiloraError or OSError if the folder's weights cannot be read any more."""
        return base_fingerprint(self.folder)


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
    identity: BaseIdentity | None = None
    """None: nothing is known of it."""

    @property
    def tied(self) -> bool:
        """The head's weight is the embedding's."""
        return self.head is not None and self.head is self.embedding
