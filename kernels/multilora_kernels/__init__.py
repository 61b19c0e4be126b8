# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA kernels: a step's tokens sorted by adapter, then x A^T B at each adapter's own rank.

B is added by a kernel of its own or inside the one that reads the linear's output anyway (rope_write,
gated_activation). Each op runs its kernel on CUDA tensors and its torch reference on all others, so that the package
imports and works without Triton-lang and without a GPU.
"""

from __future__ import annotations

from multilora_kernels.activation import gated_activation, gated_activation_reference
from multilora_kernels.copy_blocks import CopyTable, copy_blocks, copy_blocks_reference
from multilora_kernels.delta import Delta
from multilora_kernels.grouped_expand import grouped_expand, grouped_expand_reference
from multilora_kernels.grouped_shrink import grouped_shrink, grouped_shrink_reference
from multilora_kernels.rmsnorm import add_rmsnorm, add_rmsnorm_reference
from multilora_kernels.rope import rope_write, rope_write_reference
from multilora_kernels.routed import routed_segments, routed_segments_reference
from multilora_kernels.row_affine import Affine, row_affine, row_affine_reference
from multilora_kernels.segments import (
    NO_ADAPTER,
    SegmentPlan,
    Segments,
    max_packed,
    max_tiles,
    padded_rank,
    plan_segments,
)
from multilora_kernels.variants import ANY_RANKS, FEW_RANKS, ROW_STEPS, block_m_for, rank_block_for, row_step

__all__ = [
    "ANY_RANKS",
    "FEW_RANKS",
    "NO_ADAPTER",
    "ROW_STEPS",
    "Affine",
    "CopyTable",
    "Delta",
    "SegmentPlan",
    "Segments",
    "add_rmsnorm",
    "add_rmsnorm_reference",
    "block_m_for",
    "copy_blocks",
    "copy_blocks_reference",
    "gated_activation",
    "gated_activation_reference",
    "grouped_expand",
    "grouped_expand_reference",
    "grouped_shrink",
    "grouped_shrink_reference",
    "max_packed",
    "max_tiles",
    "padded_rank",
    "plan_segments",
    "rank_block_for",
    "rope_write",
    "rope_write_reference",
    "routed_segments",
    "routed_segments_reference",
    "row_affine",
    "row_affine_reference",
    "row_step",
]
