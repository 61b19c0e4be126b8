# SPDX-License-Identifier: Apache-2.0
"""What adapters must know of the running base model besides where LoRA may act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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

    linears: Sequence[BaseLinear]
    """One for each site, in their order."""
