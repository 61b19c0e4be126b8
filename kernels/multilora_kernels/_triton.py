# SPDX-License-Identifier: Apache-2.0
"""The one place that imports Triton-lang, so that the package imports without it (the references need torch only)."""

from __future__ import annotations

import sys
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""Kernels run on the CPU under Triton's interpreter. TRITON_INTERPRET=1 must be set before the first import of
triton, which torch may do early: set it in the environment of the process, not in the process."""


def jit(kernel: Any = None, **options: Any) -> Any:
    """`triton.jit`, or the bare function without Triton, which then only has to be importable."""
    if kernel is None:
        return partial(jit, **options)
    return kernel if triton is None else triton.jit(kernel, **options)


def use_kernel(tensor: Tensor) -> bool:
    """Whether an op on this tensor runs its kernel; otherwise its torch reference, which runs anywhere."""
    return triton is not None and (tensor.is_cuda or INTERPRETED)


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have: 227 KiB on Hopper, less on most others; no limit on a CPU."""
    if device.type != "cuda":
        return sys.maxsize
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks this one
    return int(properties.shared_memory_per_block_optin)


def row_stride(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    """Elements from one row to the next. Eager steps call this some 20 times a layer: 0.2 us.

    Raises:
        ValueError: the tensor has another dtype, or its last dimension is not dense in memory.
    """
    strides = tensor.stride()
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: {name} must have dtype {dtype} as the other tensors, got {tensor.dtype}")
    if strides[-1] != 1:
        raise ValueError(f"{op}: {name} must be dense in its last dimension, got strides {strides}")
    return strides[0]
