# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA kernels: a step's tokens sorted by adapter, then x A^T B at each adapter's own rank.

Imports without Triton-lang and without a GPU; the references then do the work.
"""

from __future__ import annotations

from multilora_kernels.delta import lora_delta
from multilora_kernels.grouped_expand import grouped_expand, grouped_expand_reference
from multilora_kernels.grouped_shrink import grouped_shrink, grouped_shrink_reference, splits_for
from multilora_kernels.segments import NO_ADAPTER, SegmentPlan, Segments, block_m_for, plan_segments

__all__ = [
    "NO_ADAPTER",
    "SegmentPlan",
    "Segments",
    "block_m_for",
    "grouped_expand",
    "grouped_expand_reference",
    "grouped_shrink",
    "grouped_shrink_reference",
    "lora_delta",
    "plan_segments",
    "splits_for",
]
