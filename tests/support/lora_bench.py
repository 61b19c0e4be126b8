# SPDX-License-Identifier: Apache-2.0
"""Two linears and a pool of adapters under a strategy of LoRA, compared with each row by itself in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gpu_models import CUDA
from multilora_backend.adapters.layout import AdapterWeights, allocate
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.state import Lease
from multilora_backend.core import LoraSite, SamplingParams, Sequence, Slot, StepPlan
from multilora_backend.models.batch import Batch
from multilora_backend.models.linear import FusedLinear
from multilora_backend.models.lora import LoraStep
from multilora_backend.models.strategies import create_strategy
from multilora_kernels import grouped_expand

SITES = [
    LoraSite("qkv", 40, ("q", "k", "v"), (56, 24, 13)),
    LoraSite("o", 24, ("o",), (50,)),
]
RANKS = (3, 8, 16, 40, 33, 24, 50)
"""Of the adapters in slots 0, 1, ...: 200 ranks in pages of 8, so that all fit only the third tier."""
TARGETS = [
    pytest.param(device, dtype, id=f"{device}-{str(dtype)[6:]}", marks=CUDA if device == "cuda" else ())
    for device in ("cpu", "cuda")
    for dtype in (torch.float32, torch.bfloat16)
]  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A `[slices, rank, K]` and B `[rank, width]` of each site, fp64 on the CPU."""

    a: list[Tensor]
    b: list[Tensor]


class Bench:
    """Two linears, a pool of adapters, and a strategy over them."""

    def __init__(self, strategy: str, device: str, dtype: torch.dtype, ranks: tuple[int, ...] = RANKS) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(1)
        self.linears = []
        for index, site in enumerate(SITES):
            parts = [nn.Linear(site.in_features, width, bias=index == 0) for width in site.out_features]
            for parameter in (p for part in parts for p in part.parameters()):
                parameter.data.copy_(torch.randn(parameter.shape, generator=self.generator))
            self.linears.append(FusedLinear(site, index, parts).to(device, dtype))
        self.weights = [linear.weight.detach().double().cpu() for linear in self.linears]
        self.num_ranks = sum(padded(rank) + 8 for rank in ranks)
        self.pool = DevicePool(SITES, 2**28, dtype, device, max_ranks=self.num_ranks)
        for tensor in [*self.pool.a, *self.pool.b]:
            tensor.fill_(torch.nan)  # what nobody owns may hold anything
        self.strategy = create_strategy(strategy, self.linears, self.pool)
        self.adapters: dict[int, Adapter] = {}
        start = 8
        for slot, rank in enumerate(ranks):
            self.write(slot, start, rank)
            start += padded(rank) + 8

    def write(self, slot: int, rank_start: int, rank: int) -> None:
        buffers, sites = allocate(SITES, {0, 1}, rank, self.dtype, pin=self.device == "cuda")
        a, b = [], []
        for site, weights in zip(SITES, sites, strict=True):
            assert weights is not None
            weights.a.zero_()
            weights.b.zero_()
            block = weights.a.view(len(site.modules), padded(rank), -1)[:, :rank]
            block.copy_(torch.randn(block.shape, generator=self.generator))
            own = weights.b[:rank]
            own.copy_(torch.randn(own.shape, generator=self.generator))
            a.append(block.double())
            b.append(own.double())
        self.pool.write(AdapterWeights("", rank, sites, buffers, no_effect=False), slot, rank_start)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.adapters[slot] = Adapter(a, b)

    def expected(self, site: int, x: Tensor, slots: list[int]) -> tuple[Tensor, Tensor]:
        """fp64 result of each row by itself, and the sum of all magnitudes in it, for the tolerance."""
        linear = self.linears[site]
        rows, magnitudes = [], []
        for row, slot in zip(x.double().cpu(), slots, strict=True):
            bias = row.new_zeros(1) if linear.bias is None else linear.bias[: linear.site.width].double().cpu()
            weight = self.weights[site]
            y, size = weight @ row + bias, weight.abs() @ row.abs() + bias.abs()
            if slot >= 0:
                a, b = self.adapters[slot].a[site], self.adapters[slot].b[site]
                widths = list(linear.site.out_features)
                lora = zip(a, b.split(widths, dim=1), y.split(widths), size.split(widths), strict=True)
                for a_slice, b_slice, y_slice, size_slice in lora:
                    y_slice += (a_slice @ row) @ b_slice
                    size_slice += (a_slice.abs() @ row.abs()) @ b_slice.abs()
            rows.append(y)
            magnitudes.append(size)
        return torch.stack(rows), torch.stack(magnitudes)

    def inputs(self, rows: int) -> list[Tensor]:
        shapes = [(rows, site.in_features) for site in SITES]
        return [torch.randn(shape, generator=self.generator).to(self.device, self.dtype) for shape in shapes]

    def compute(self, site: int, x: Tensor) -> Tensor:
        linear = self.linears[site]
        y, delta = self.strategy.project(linear, x)
        if delta is not None:
            grouped_expand(y, delta, linear.site.out_features)
        return y

    def check(self, batch: Batch, step: LoraStep | None = None) -> LoraStep:
        """Runs the batch with NaN in all memory that is none of its adapters', and compares every row."""
        step = step or self.strategy.plan(batch)
        self.strategy.enter(step, None if step.segments is None else step.segments.to(self.device))
        slots = batch.adapter_slots.tolist()
        with self.poisoned(step, {slot for slot in slots if slot >= 0}):
            for site, x in enumerate(self.inputs(batch.num_rows)):
                actual = self.compute(site, x).double().cpu()
                expected, magnitude = self.expected(site, x, slots)
                # fp32 sums of K and rank terms; h, the base and the result rounded to the dtype.
                terms = SITES[site].in_features + max(RANKS) + 8
                bound = terms * torch.finfo(torch.float32).eps + 2 * torch.finfo(self.dtype).eps
                assert ((actual - expected).abs() <= bound * magnitude).all(), (slots, site)
        return step

    @contextmanager
    def poisoned(self, step: LoraStep, used: set[int]) -> Iterator[None]:
        """NaN in the pool rows of adapters that are not in the step, and in the border where its own do not lie."""
        borders = [linear.weight.data[linear.site.width :] for linear in self.linears]
        regions = [*self.pool.a, *self.pool.b, *borders]
        before = [region.clone() for region in regions]
        for slot in set(self.adapters) - used:
            start, stop = self.pool.rank_start[slot], self.pool.rank_start[slot] + padded(self.pool.rank[slot])
            for linear, a, b in zip(self.linears, self.pool.a, self.pool.b, strict=True):
                a[start * linear.slices : stop * linear.slices] = torch.nan
                b[start:stop] = torch.nan
        own = {}
        if step.tier and step.segments is not None:
            own = {h_start: rank for _, _, _, rank, h_start, *_ in step.segments.tiles.tolist() if rank}
        for linear, border in zip(self.linears, borders, strict=True):
            free = torch.ones(len(border), dtype=torch.bool, device=self.device)
            for h_start, rank in own.items():
                free[h_start * linear.slices : (h_start + padded(rank)) * linear.slices] = False
            border[free] = torch.nan
        yield
        for region, content in zip(regions, before, strict=True):
            region.copy_(content)


def batch_of(*slots: tuple[int, int]) -> Batch:
    """(adapter slot or -1, rows) of each sequence."""
    planned = []
    for number, (adapter, count) in enumerate(slots):
        sequence = Sequence(("f", number, 0), count, [1] * count, SamplingParams(), 0)
        sequence.pages = [number + 1] * -(-count // 4)
        if adapter >= 0:
            sequence.lease = Lease("", "", adapter, 0, 8, 1)
        planned.append(Slot(sequence, 0, count, samples=True))
    return Batch.from_plan(StepPlan(tuple(planned)), 4)


def decode_of(*adapters: int) -> Batch:
    return batch_of(*((adapter, 1) for adapter in adapters))
