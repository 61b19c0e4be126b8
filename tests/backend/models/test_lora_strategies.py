# SPDX-License-Identifier: Apache-2.0
"""Every strategy adds each row's own B (A x), and nothing of what else lies in the pool or in the border."""

from __future__ import annotations

import random
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
from multilora_backend.models.bordered import Bordered
from multilora_backend.models.linear import FusedLinear
from multilora_backend.models.lora import LoraStep, NoLora
from multilora_backend.models.strategies import STRATEGIES, create_strategy
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


BATCHES = {
    "chunks": batch_of((0, 5), (3, 37), (-1, 9), (1, 1), (3, 2), (2, 20)),
    "chunks, padded": batch_of((0, 5), (3, 7), (-1, 2)).padded(32),
    "chunks, padded by one sequence": batch_of((0, 5), (3, 7), (-1, 2)).padded(32, one_row_each=False),
    "chunks without adapters": batch_of((-1, 5), (-1, 3)),
    "decodes": decode_of(1, -1, 3, 0, 0, 2, -1, 3, 1),
    "decodes, padded": decode_of(3, -1, 0, 0, 2).padded(16),
    "one decode": decode_of(2),
    "one decode, padded": decode_of(2).padded(8),
    "many decodes of one": decode_of(*[3] * 40),
    "decodes of all": decode_of(6, 5, 4, 3, 2, 1, 0, -1),
    "decodes without adapters": decode_of(-1, -1),
}


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_row_gets_its_own_adapter_and_nothing_else(strategy: str, device: str, dtype: torch.dtype):
    bench = Bench(strategy, device, dtype)
    for name, batch in BATCHES.items():
        step = bench.check(batch)
        assert (step.segments is None) == bool((batch.adapter_slots < 0).all()), name


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_come_go_and_are_replaced(strategy: str, device: str, dtype: torch.dtype):
    rng = random.Random(7)
    bench = Bench(strategy, device, dtype)
    moves, tiers = 0, set()
    for _ in range(40):
        if rng.random() < 0.3:  # another adapter in the same slot, at most as large
            slot = rng.randrange(len(RANKS))
            bench.write(slot, int(bench.pool.rank_start[slot]), rng.randint(RANKS[slot] // 2, RANKS[slot]))
        among = rng.sample(range(-1, len(RANKS)), rng.randint(1, 7))
        rows = [rng.choice(among) for _ in range(rng.randint(1, 20))]
        step = bench.check(decode_of(*rows) if rng.random() < 0.8 else batch_of(*((row, 3) for row in rows)))
        moves += len(step.moves)
        tiers.add(step.tier)
    if strategy == "bordered":
        assert tiers == {0, 64, 128, 256}
        assert moves > 20
    else:
        assert tiers == {0}


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_a_decode_step_takes_the_border_padded_or_not(device: str, dtype: torch.dtype):
    bench = Bench("bordered", device, dtype)
    for batch in (decode_of(2, 0, -1), decode_of(2, 0, -1).padded(8), decode_of(0).padded(2)):
        assert bench.check(batch).tier == 64
    assert bench.check(batch_of((2, 5), (0, 1))).tier == 0, "chunks do not"
    assert bench.check(batch_of((2, 5)).padded(8)).tier == 0
    decode = decode_of(2, 0, -1).padded(8, one_row_each=False)
    step = bench.check(decode, bench.strategy.plan(decode, block_m=32))
    assert step.segments is not None
    assert (step.tier, step.segments.block_m) == (0, 32), "nor does what is to run in pieces of graph"


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("width", [0, 2.1, 3], ids=["shrink everywhere", "shrink at qkv", "border everywhere"])
def test_a_step_with_prompts_of_few_ranks_takes_the_border(
    width: float, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("multilora_backend.models.bordered.PROMPT_WIDTH", width)
    bench = Bench("bordered", device, dtype)
    strategy = bench.strategy
    for adapters, tier in (((0, 1, 2), 64), ((5, 3), 64), ((6, 2), 0), ((3, 4), 0), ((), 0), ((2,), 64)):
        batch = batch_of(*((adapter, 7 + adapter) for adapter in (*adapters, -1))).padded(80, one_row_each=False)
        assert strategy.prompt_tier(strategy.ranks(batch)) == tier
        step = bench.check(batch, strategy.plan(batch, 32, tier))
        assert step.tier == tier
        assert step.segments is None or step.segments.block_m == 32
        bench.check(decode_of(*adapters, -1))
        assert bench.check(batch, strategy.plan(batch, 16, tier)).moves == (), "decode steps left them there"


def test_wide_linears_leave_the_border_to_decode_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("multilora_backend.models.bordered.PROMPT_WIDTH", 2.1)
    bench = Bench("bordered", "cpu", torch.float32)

    def by_the_border(batch: Batch, step: LoraStep) -> list[bool]:
        """Of qkv (2.3 times as wide as its input) and o (2.1): then h lies behind y in one row."""
        bench.check(batch, step)
        outputs = [bench.strategy.project(*pair)[0] for pair in zip(bench.linears, bench.inputs(80), strict=True)]
        return [not y.is_contiguous() for y in outputs]

    decode = decode_of(*[0] * 80)
    assert by_the_border(decode, bench.strategy.plan(decode)) == [True, True]
    prompts = batch_of((0, 80))
    assert by_the_border(prompts, bench.strategy.plan(prompts, 32, 64)) == [False, True]
    assert by_the_border(prompts, bench.strategy.plan(prompts, 32)) == [False, False]


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_what_is_in_the_border_already_is_not_copied_again(device: str, dtype: torch.dtype):
    bench = Bench("bordered", device, dtype)
    assert len(bench.check(decode_of(0, 2, 1)).moves) == 3
    assert bench.check(decode_of(0, 2, 1)).moves == ()
    assert bench.check(decode_of(2, -1)).moves == ()
    assert len(bench.check(decode_of(2, 5)).moves) == 1
    bench.write(2, int(bench.pool.rank_start[2]), 16)
    assert [move.key[0] for move in bench.check(decode_of(2, 5)).moves] == [2], "it is another adapter now"
    bench.check(batch_of((2, 4), (3, 7)))
    assert bench.check(decode_of(2, 5)).moves == (), "a step of chunks does not touch it"


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_more_ranks_than_the_border_holds_go_by_kernels(device: str, dtype: torch.dtype):
    bench = Bench("bordered", device, dtype, ranks=(520, 9, 515))
    assert bench.check(decode_of(0, 1, -1)).tier == 1024
    both = decode_of(0, 2, 1, -1)
    assert bench.strategy.tier(bench.strategy.ranks(both)) is None
    assert bench.check(both).tier == 0
    assert bench.check(decode_of(1, 2)).tier == 1024


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_adapter_of_nan_spoils_its_own_rows_only(strategy: str, device: str, dtype: torch.dtype):
    bench = Bench(strategy, device, dtype)
    start, stop = int(bench.pool.rank_start[2]), int(bench.pool.rank_start[2]) + 16
    for linear, a, b in zip(bench.linears, bench.pool.a, bench.pool.b, strict=True):
        a[start * linear.slices : stop * linear.slices] = torch.nan
        b[start:stop] = torch.nan
    for batch in (decode_of(0, 2, -1, 3, 2, 1).padded(8), batch_of((2, 3), (-1, 2), (0, 2), (2, 1))):
        step = bench.strategy.plan(batch)
        bench.strategy.enter(step, None if step.segments is None else step.segments.to(device))
        spoilt = torch.from_numpy(batch.adapter_slots == 2)
        for site, x in enumerate(bench.inputs(batch.num_rows)):
            nan = bench.compute(site, x).isnan().cpu()
            assert torch.equal(nan, spoilt[:, None].expand_as(nan))


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
@pytest.mark.parametrize("strategy", ["reference", "grouped"])
def test_rows_without_adapter_stay_bit_for_bit(strategy: str, device: str, dtype: torch.dtype):
    bench = Bench(strategy, device, dtype)
    batch = BATCHES["decodes"]
    step = bench.strategy.plan(batch)
    bench.strategy.enter(step, None if step.segments is None else step.segments.to(device))
    without = torch.from_numpy(batch.adapter_slots < 0)
    for site, x in enumerate(bench.inputs(batch.num_rows)):
        base, delta = NoLora().project(bench.linears[site], x)
        assert delta is None
        assert torch.equal(bench.compute(site, x)[without], base[without])


@pytest.mark.parametrize("seed", range(4))
def test_every_decode_step_fits_the_graph_of_its_tier(seed: int):
    """A graph's GEMMs are as wide as the tier that the step was given, and it has room for as many tiles."""
    rng = random.Random(seed)
    bench = Bench("bordered", "cpu", torch.float32, ranks=tuple(rng.choice((1, 3, 8, 16, 40)) for _ in range(30)))
    strategy = bench.strategy
    assert isinstance(strategy, Bordered)
    for _ in range(50):
        among = rng.sample(range(-1, 30), rng.randint(1, 30))
        batch = decode_of(*(rng.choice(among) for _ in range(rng.randint(1, 40))))
        tier = strategy.tier(strategy.ranks(batch))
        assert tier is not None
        rows = batch.num_rows + rng.randint(0, 15)
        step, base = strategy.plan(batch.padded(rows)), strategy.base_step(rows, tier)
        assert base.tier == tier >= step.tier
        if step.segments is None:
            assert tier == 0
            assert base.segments is None
            continue
        assert base.segments is not None
        ends = [h_start + h_stride for _, _, _, rank, h_start, h_stride, *_ in step.segments.tiles.tolist() if rank]
        assert max(ends) <= tier
        step.segments.pad_to(base.segments.num_tiles)  # raises if they do not fit
        assert base.segments.block_m == step.segments.block_m


def test_without_a_pool_lora_is_off():
    bench = Bench("grouped", "cpu", torch.float32)
    assert isinstance(create_strategy("bordered", bench.linears, None), NoLora)
    assert len(bench.linears[0].weight) == SITES[0].width, "and no border is made"
