# SPDX-License-Identifier: Apache-2.0
"""Linears of the running model: q/k/v and gate/up fused into one GEMM, with LoRA added by the step's strategy.

transformers keeps calling `q_proj(x)`, `k_proj(x)`, `v_proj(x)`. The first becomes a `Lead`, which runs the
fused linear and keeps the parts; the others become `Follow`s, which hand the parts out. That relies on the
lead being called first and all with the same input; `models.loader` checks both on a small batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multilora_backend.core import LoraSite
from multilora_backend.models import context


class FusedLinear(nn.Module):
    """`y = x W^T + b`, then LoRA in place. W is `[site.width, site.in_features]`, slice-major."""

    def __init__(self, site: LoraSite, index: int, parts: Sequence[nn.Linear]) -> None:
        """`index` is the site's place among all sites of the model: the adapter pool is indexed by it."""
        super().__init__()
        self.site = site
        self.index = index
        self.weight = nn.Parameter(torch.cat([p.weight.data for p in parts]), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if any(p.bias is not None for p in parts):
            biases = [p.weight.new_zeros(p.out_features) if p.bias is None else p.bias.data for p in parts]
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> `[..., width]`."""
        y = F.linear(x, self.weight, self.bias)
        context.current().lora.run(self.index, x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y


class Lead(nn.Module):
    """Takes the place of a group's first linear: computes all parts, returns the first."""

    def __init__(self, fused: FusedLinear) -> None:
        super().__init__()
        self.fused = fused
        self.parts: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.parts = self.fused(x).split(self.fused.site.out_features, dim=-1)
        return self.parts[0]


class Follow(nn.Module):
    """Takes the place of a further linear of the group: returns its part of the lead's last result."""

    def __init__(self, lead: Lead, part: int) -> None:
        super().__init__()
        # In a tuple, or nn.Module would register the lead a second time.
        self._lead = (lead,)
        self._part = part

    def forward(self, x: Tensor) -> Tensor:
        return self._lead[0].parts[self._part]
