# SPDX-License-Identifier: Apache-2.0
"""Rows go to their experts and come back, each as if it were alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from multilora_backend.models import context
from multilora_backend.models.lora import NoLora
from multilora_backend.models.moe import ExpertLinears, Route, capturable, grouped_linear

EXPERTS = 6


def route_of(chosen: torch.Tensor) -> Route:
    step = context.StepContext(SimpleNamespace(), NoLora(), torch.empty(0))  # type: ignore[arg-type]
    with context.step(step):
        return Route.of(chosen, EXPERTS)


@given(st.data())
def test_each_row_gets_the_weighted_sum_of_its_own_experts(data: st.DataObject):
    rows, top_k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, EXPERTS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    among = data.draw(st.integers(top_k, EXPERTS))  # some experts have no rows
    chosen = torch.stack([torch.randperm(among, generator=generator)[:top_k] for _ in range(rows)])
    weights = torch.rand(rows, top_k, generator=generator)
    x = torch.randn(rows, 10, generator=generator)
    weight = torch.randn(EXPERTS, 7, 10, generator=generator)
    route = route_of(chosen)
    assert route.ends[-1] == rows * top_k
    y = route.combine(grouped_linear(x[route.rows], weight, route.ends), weights)
    for row in range(rows):
        own = weight[chosen[row]].double() @ x[row].double()
        expected = (own * weights[row, :, None]).sum(0)
        magnitude = (weight[chosen[row]].abs().double() @ x[row].abs().double() * weights[row, :, None]).sum(0)
        # Sums of 10 and of at most 6 terms in float32, in some order.
        assert ((y[row] - expected).abs() <= 20 * torch.finfo(torch.float32).eps * magnitude).all()


def test_the_sum_is_rounded_once():
    chosen = torch.tensor([[0, 1, 2]])
    # 1 + 2^-8 is half way to bf16's next number and would be rounded to 1, twice.
    y = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    out = route_of(chosen).combine(y, torch.ones(1, 3))
    assert out.dtype == torch.bfloat16
    assert out.item() == 1.0 + 2.0**-7


@pytest.mark.parametrize("experts", [True, False])
def test_what_torch_can_only_loop_over_is_not_captured(experts: bool):
    weight = nn.Parameter(torch.zeros(EXPERTS, 8, 8, dtype=torch.bfloat16))
    model = nn.Sequential(ExpertLinears(weight, 0)) if experts else nn.Sequential(nn.Linear(8, 8))
    assert capturable(model) != experts
