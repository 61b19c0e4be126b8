# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: a router sends each row through a few of many gated MLPs, and their outputs are weighted.

Rows are sorted by expert, so that all experts are one grouped GEMM each way. Where experts' rows begin stays on the
device: on CUDA nothing waits for the host, and a decode step can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multilora_backend.models import context
from multilora_backend.models.linear import FusedLinear
from multilora_kernels import Segments, gated_activation


@dataclass(frozen=True, eq=False)
class Route:
    """The `P = T * top_k` visits of a step's rows to experts, sorted by expert."""

    order: Tensor
    """int64 [P]: visit v of row t is t * top_k + v; the visit at each sorted place."""
    rows: Tensor
    """int64 [P]: the row of each sorted visit."""
    ends: Tensor
    """int32 [experts]: expert e has the visits from ends[e - 1] to ends[e]."""
    segments: Segments | None
    """Of the sorted visits, by adapter and expert; None: no adapter of the step acts on experts."""

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int) -> Route:
        """chosen int64 [T, top_k]: the experts of each row."""
        experts, order = chosen.reshape(-1).sort(stable=True)
        every = torch.arange(num_experts, device=chosen.device)
        # Not bincount: that asks the device for the largest value.
        ends = torch.searchsorted(experts, every, right=True, out_int32=True)
        rows = order // chosen.shape[1]
        return cls(order, rows, ends, context.current().lora.visits(rows, experts, num_experts))

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of each row's visits: y `[P, N]` sorted, weights `[T, top_k]` -> `[T, N]`, rounded once."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(place), device=place.device)
        own = y[place].view(*weights.shape, -1)
        return (own.float() * weights.float()[..., None]).sum(1).to(y.dtype)


class Router(nn.Module):
    """Softmax over all experts in float32, then the top_k; a linear that LoRA may act on."""

    def __init__(self, module: Any, gate: FusedLinear) -> None:
        super().__init__()
        self.gate = gate
        self.top_k = int(module.top_k)
        # Mixtral always makes the weights add up to one and keeps them in float32; Qwen has a switch, and rounds.
        self.normalise = bool(getattr(module, "norm_topk_prob", True))
        self.rounded = hasattr(module, "norm_topk_prob")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[T, hidden]` -> weights and int64 experts, each `[T, top_k]`."""
        logits = self.gate.complete(x)
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(self.top_k)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(logits.dtype) if self.rounded else weights, chosen


class ExpertLinears(nn.Module):
    """The same linear of every expert. W is `[experts, width, in_features]`."""

    def __init__(self, weight: nn.Parameter, index: int) -> None:
        """`index` is the site's place among all sites of the model; not looked at without LoRA on experts."""
        super().__init__()
        self.weight = weight
        self.index = index

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """x `[P, in_features]`, a visit a row, sorted -> `[P, width]`, with LoRA added."""
        y = grouped_linear(x, self.weight, route.ends)
        if route.segments is not None:
            context.current().lora.add_on_experts(self.index, x, y, route.segments)
        return y


class MoeMlp(nn.Module):
    """Takes the place of a gated MLP."""

    def __init__(self, kind: str, router: Router, gate_up: ExpertLinears, down: ExpertLinears) -> None:
        super().__init__()
        self.kind = kind
        self.router = router
        self.gate_up_proj, self.down_proj = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        """x `[T, hidden]` -> `[T, hidden]`."""
        weights, chosen = self.router(x)
        route = Route.of(chosen, len(self.gate_up_proj.weight))
        gate_up = self.gate_up_proj(x[route.rows], route)
        return route.combine(self.down_proj(gated_activation(gate_up, self.kind), route), weights)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x `[P, K]`, weight `[G, N, K]`, ends int32 `[G]` -> `[P, N]`: rows ends[g - 1] to ends[g] times weight[g]^T."""
    if has_grouped_gemm(weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return grouped_linear_reference(x, weight, ends)


def has_grouped_gemm(weight: Tensor) -> bool:
    """Whether torch multiplies by groups on that device without asking it where they begin.

    In other dtypes and on older devices it loops on the host, as the reference does; on the CPU it gains nothing.
    """
    if not (weight.is_cuda and weight.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")):
        return False
    aligned = not any(size % 8 for size in weight.shape[1:])  # rows of whole 16 bytes, both ways
    return aligned and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def grouped_linear_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One matmul for each group that has rows. Any device; reads `ends` on the host."""
    y = x.new_empty(len(x), weight.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[group].T, out=y[start:end])
        start = end
    return y


def capturable(model: nn.Module) -> bool:
    """Whether CUDA graphs can hold the model's steps."""
    return all(has_grouped_gemm(module.weight) for module in model.modules() if isinstance(module, ExpertLinears))
