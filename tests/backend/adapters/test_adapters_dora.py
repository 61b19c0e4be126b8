# SPDX-License-Identifier: Apache-2.0
"""DoRA's norms, computed in pieces, are those of the whole matrix."""

from __future__ import annotations

import pytest
import torch

from multilora_backend.adapters import dora
from multilora_backend.adapters.dora import row_norms

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 50 * 7, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_whole_matrix(chunk_bytes, dtype, monkeypatch):
    monkeypatch.setattr(dora, "CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((33, 50), (5, 50), (33, 5)))
    norms = row_norms(weight, a, b, 0.7)
    expected = (weight.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    assert norms.dtype == torch.float32
    assert (norms - expected).abs().max() <= 16 * EPS * expected.max()
