# SPDX-License-Identifier: Apache-2.0
"""Copies tensors of a file to where they are needed, and makes sure that they are numbers there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multilora_backend.adapters.tensors import TensorInfo
from multilora_backend.errors import invalid


def put(target: Tensor, info: TensorInfo, source: Tensor, scale: float = 1.0) -> bool:
    """Writes scale * source, computed in float32 if the scale is not 1, as the target's dtype. False if it is zero.

    Raises MultiloraError that names the tensor if it holds NaN or infinity, in the file or in the target's dtype.
    """
    target.copy_(source if scale == 1.0 else source.float() * scale)
    most = largest(target)
    if not math.isfinite(most):
        if not math.isfinite(largest(source)):
            raise invalid(info.name, "holds NaN or infinity")
        raise invalid(info.name, f"does not fit {target.dtype} with the scale {scale:g}")
    return most > 0


def largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one. Several times faster on the CPU than isfinite, all and any."""
    low, high = torch.aminmax(tensor)
    return max(abs(float(low)), abs(float(high)))
