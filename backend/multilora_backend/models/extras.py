# SPDX-License-Identifier: Apache-2.0
"""What a step's adapters do besides A and B: which of it is in the step, and what kernels need for it.

Each kind of extra has one method here, which the layer that it acts on asks in every step. It answers None unless an
adapter of the step has something for that very place, and then the layer launches what it always does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from multilora_backend.adapters.extras import affine_spec
from multilora_backend.adapters.extras_pool import ExtrasPool
from multilora_kernels import Affine, SegmentPlan, Segments

if TYPE_CHECKING:
    from multilora_backend.models.batch import Batch
    from multilora_backend.models.linear import FusedLinear

Mask = NDArray[np.bool_]
"""[keys of the pool]: which of them the adapters of a step have."""


class StepExtras:
    """Belongs to a LoRA strategy, whose segments say which row is whose."""

    def __init__(self, pool: ExtrasPool | None) -> None:
        """`pool` None: there are no adapters."""
        self._pool = pool
        self._mask: Mask | None = None
        self._segments: Segments | None = None

    def act_on(self, batch: Batch) -> bool:
        """Whether an adapter of the batch has extras. Such a step runs eagerly: graphs launch nothing for them."""
        if self._pool is None or not self._pool.present.any():
            return False
        rows = batch.adapter_slots
        return bool(self._pool.present[rows[rows >= 0]].any())

    def plan(self, segments: SegmentPlan) -> Mask | None:
        """For the step's `LoraStep`; None: its adapters have none."""
        return None if self._pool is None else self._pool.used_by(segments.active)

    def everything(self) -> Mask | None:
        """The mask of a step that launches all kernels that there are, for warm-up; None: it has none to launch."""
        if self._pool is None or not self._pool.nbytes:
            return None
        return np.ones(len(self._pool.index), dtype=np.bool_)

    def enter(self, mask: Mask | None, segments: Segments | None) -> None:
        """From here on the methods below are about this step."""
        self._mask, self._segments = mask, segments

    def affine(self, linear: FusedLinear) -> Affine | None:
        """Gain and shift for the linear's output, after LoRA has been added to it (DoRA, trained biases)."""
        if self._mask is None or self._pool is None or self._segments is None:
            return None
        row = self._pool.index[affine_spec(linear.site).key]
        if not self._mask[row]:
            return None
        return Affine(self._pool.values(torch.float32), self._pool.offsets(row), self._segments)
