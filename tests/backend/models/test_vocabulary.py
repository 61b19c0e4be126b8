# SPDX-License-Identifier: Apache-2.0
"""The head's result where a graph wants it, to the bit what it is elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from multilora_backend.models import context
from multilora_backend.models.extras import Rows, Table
from multilora_backend.models.lora import NoLora
from multilora_backend.models.vocabulary import Head

HIDDEN, VOCAB = 40, 61


@pytest.fixture(params=[False, True], ids=["", "biased"])
def base(request: pytest.FixtureRequest) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCAB, bias=request.param)


def hidden(rows: int) -> torch.Tensor:
    return torch.randn(1, rows, HIDDEN, generator=torch.Generator().manual_seed(rows))


def run(head: Head, x: torch.Tensor, out: torch.Tensor | None, tables: list[Rows] | None = None) -> torch.Tensor:
    lora: Any = NoLora()
    if tables is not None:
        lora = SimpleNamespace(extras=SimpleNamespace(head=lambda: tables))
    attention: Any = SimpleNamespace()
    with torch.inference_mode(), context.step(context.StepContext(attention, lora, torch.empty(0), logits=out)):
        return head(x)


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_lies_in_the_buffer_and_nowhere_else(base: nn.Linear, dtype: torch.dtype, rows: int):
    head, x = Head(base.to(dtype)), hidden(rows).to(dtype)
    buffer = torch.full((rows + 3, VOCAB), torch.nan, dtype=dtype)
    logits = run(head, x, buffer[:rows])
    with torch.inference_mode():
        assert torch.equal(logits, base(x)), "bit for bit"
    assert logits.shape == (1, rows, VOCAB)
    assert logits[0].is_set_to(buffer[:rows])
    assert buffer[rows:].isnan().all()


@pytest.mark.parametrize("shape", [(4, VOCAB), (6, VOCAB), (5, VOCAB - 1), (5, VOCAB + 1)], ids=str)
def test_a_buffer_of_another_shape_is_refused_and_left_alone(base: nn.Linear, shape: tuple[int, int]):
    buffer = torch.full(shape, torch.nan)
    with pytest.raises(ValueError, match=r"logits must be \[5, 61\], got"):
        run(Head(base), hidden(5), buffer)
    assert buffer.shape == shape
    assert buffer.isnan().all()


@pytest.mark.parametrize("width", [VOCAB - 1, VOCAB, VOCAB + 6])
def test_heads_of_adapters_make_a_tensor_of_their_own(base: nn.Linear, width: int):
    own = torch.randn(width, HIDDEN, generator=torch.Generator().manual_seed(1))
    tables = [(torch.tensor([1, 3]), Table(own, None, None, None, None, None))]
    buffer = torch.full((5, VOCAB), torch.nan)
    logits = run(Head(base), hidden(5), buffer, tables)
    assert torch.equal(logits, run(Head(base), hidden(5), None, tables))
    assert buffer.isnan().all()
