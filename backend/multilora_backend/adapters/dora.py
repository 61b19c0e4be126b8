# SPDX-License-Identifier: Apache-2.0
"""DoRA's norm: how long the rows of W + scale B A are, computed once when an adapter is read, never in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 2**20
"""Float32 rows of W + scale B A are made in pieces of at most this size: the device has little room to spare."""


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Euclidean norm of each row of weight + scale b a, float32 [out] on the CPU.

    Args:
        weight: [out, in], any floating dtype; it is computed where this lies.
        a, b: [rank, in] and [out, rank], any floating dtype.

    Adapters may be read while steps run, so on CUDA it has a stream of its own. Formula: arXiv:2402.09353, equation 5.
    """
    rows = max(1, CHUNK_BYTES // (weight.shape[1] * torch.float32.itemsize))
    with own_stream(weight.device):
        a, b = a.to(weight.device, torch.float32), (b.float() * scale).to(weight.device)
        pieces = zip(weight.split(rows), b.split(rows), strict=True)
        norms = [torch.linalg.vector_norm(torch.addmm(w.float(), b_rows, a), dim=1) for w, b_rows in pieces]
        return torch.cat(norms).cpu()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_stream(device)):
        yield


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
