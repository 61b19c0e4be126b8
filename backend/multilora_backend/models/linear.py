# SPDX-License-Identifier: Apache-2.0
"""Linears of the running model: q/k/v and gate/up are one GEMM each, with room behind the weight for LoRA's A."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from multilora_backend.core import LoraSite
from multilora_backend.models import context
from multilora_kernels import Delta, grouped_expand, row_affine


class FusedLinear(nn.Module):
    """`y = x W^T + b` and what LoRA adds to it. W is `[site.width, site.in_features]`, slice-major.

    `weight` may have a *border*: rows behind W for the A rows of the adapters of a step, so that one GEMM gives both
    y and h = x A^T. How much of it a step uses is the strategy's choice.
    """

    def __init__(self, site: LoraSite, index: int, parts: Sequence[nn.Linear]) -> None:
        """`index` is the site's place among all sites of the model: the adapter pool is indexed by it."""
        super().__init__()
        self.site = site
        self.index = index
        self.slices = len(site.modules)
        self.weight = nn.Parameter(torch.cat([p.weight.data for p in parts]), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if any(p.bias is not None for p in parts):
            biases = [p.weight.new_zeros(p.out_features) if p.bias is None else p.bias.data for p in parts]
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=False)

    @property
    def base_weight(self) -> Tensor:
        """[width, in_features]: W without the border."""
        return self.weight.data[: self.site.width]

    @property
    def base_bias(self) -> Tensor | None:
        """[width]"""
        return None if self.bias is None else self.bias.data[: self.site.width]

    def add_border(self, ranks: int) -> None:
        """Makes room for `ranks` ranks of every slice behind the weight. All of it is zero at first."""
        self.weight = nn.Parameter(_grown(self.weight.data, ranks * self.slices), requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(_grown(self.bias.data, ranks * self.slices), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Delta | None]:
        """x `[T, in_features]` -> y `[T, width]`, rows possibly strided, and what is still to be added to it."""
        lora = context.current().lora
        y, delta = lora.project(self, x)
        affine = lora.extras.affine(self)
        if affine is None:
            return y, delta
        # DoRA scales what B adds as well: it has to be there first.
        if delta is not None:
            grouped_expand(y, delta, self.site.out_features)
        row_affine(y, affine)
        return y, None

    def complete(self, x: Tensor) -> Tensor:
        """y with LoRA added, for consumers that cannot add it themselves."""
        y, delta = self(x)
        if delta is not None:
            grouped_expand(y, delta, self.site.out_features)
        return y


def _grown(tensor: Tensor, rows: int) -> Tensor:
    grown = tensor.new_zeros(tensor.shape[0] + rows, *tensor.shape[1:])
    grown[: tensor.shape[0]] = tensor
    return grown
