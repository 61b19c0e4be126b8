# SPDX-License-Identifier: Apache-2.0
"""What LoRA adds to one fused linear, on whichever device the tensors are."""

from __future__ import annotations

from torch import Tensor

from multilora_kernels.grouped_expand import grouped_expand, grouped_expand_reference
from multilora_kernels.grouped_shrink import grouped_shrink, grouped_shrink_reference, splits_for
from multilora_kernels.segments import Segments


def lora_delta(y: Tensor, x: Tensor, a: Tensor, b: Tensor, slice_widths: tuple[int, ...], segments: Segments) -> None:
    """y[t, slice i] += x[t] A_i^T B_i with the A and B of token t's adapter, in place. Kernels on CUDA, else torch.

    Args:
        y: [T, N], the base linear's output. Rows of tokens without adapter are not touched.
        x: [T, K], its input.
        a: [slices, R, K] and b: [R, N], the rank pools of this linear, b multiplied by the scale.
        slice_widths: output width of each slice, adding up to N.
        segments: the step's plan, on the tensors' device.
    """
    if segments.plan.num_tokens == 0:
        return
    if y.is_cuda:
        h = grouped_shrink(x, a, segments, splits_for(segments, a.shape[0], a.shape[2]))
        grouped_expand(y, h, b, slice_widths, segments)
    else:
        h = grouped_shrink_reference(x, a, segments)
        grouped_expand_reference(y, h, b, slice_widths, segments)
