# SPDX-License-Identifier: Apache-2.0
"""The border: which steps take h from it, what is copied into it, and that a graph's tier holds every step."""

from __future__ import annotations

import random

import pytest
import torch

from lora_bench import TARGETS, Bench, batch_of, decode_of
from multilora_backend.models.batch import Batch
from multilora_backend.models.bordered import Bordered
from multilora_backend.models.lora import LoraStep
from multilora_kernels import ANY_RANKS, FEW_RANKS


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
        step, base = strategy.plan(batch.padded(rows)), strategy.base_step(rows, tier, FEW_RANKS)
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
        for rank_block in (FEW_RANKS, ANY_RANKS):
            captured = strategy.base_step(rows, tier, rank_block).segments
            assert captured is not None
            assert captured.rank_block == rank_block
