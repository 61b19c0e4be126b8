# SPDX-License-Identifier: Apache-2.0
"""Every strategy adds each row's own B (A x), and nothing of what else lies in the pool or in the border."""

from __future__ import annotations

import random

import pytest
import torch

from lora_bench import RANKS, SITES, TARGETS, Bench, batch_of, decode_of
from multilora_backend.models.batch import Batch
from multilora_backend.models.lora import Grouped, NoLora
from multilora_backend.models.strategies import STRATEGIES, create_strategy
from multilora_kernels import ANY_RANKS, FEW_RANKS

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


@pytest.mark.parametrize("batch", [decode_of(1, -1, 0), batch_of((1, 5), (-1, 3), (0, 2))], ids=["decodes", "chunks"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_is_on_experts_if_one_of_its_adapters_is(strategy: str, batch: Batch):
    bench = Bench(strategy, "cpu", torch.float32)
    bench.pool.on_experts[2] = True
    assert not bench.strategy.plan(batch).experts, "although a resident adapter is"
    bench.pool.on_experts[0] = True
    assert bench.strategy.plan(batch).experts


def test_without_a_pool_lora_is_off():
    bench = Bench("grouped", "cpu", torch.float32)
    assert isinstance(create_strategy("bordered", bench.linears, None), NoLora)
    assert len(bench.linears[0].weight) == SITES[0].width, "and no border is made"


@pytest.mark.parametrize("strategy", ["grouped", "bordered"])
def test_prompts_of_more_ranks_have_larger_tiles_and_warm_up_meets_them(strategy: str):
    lora = Bench(strategy, "cpu", torch.float32).strategy
    assert isinstance(lora, Grouped)
    few, many = RANKS.index(max(rank for rank in RANKS if rank <= FEW_RANKS)), RANKS.index(max(RANKS))
    for rows, tiles in ((1000, (16, 16)), (1500, (16, 32)), (3000, (32, 32))):
        planned = [lora.plan(batch_of((adapter, rows))).segments for adapter in (few, many)]
        assert tuple(segments.block_m for segments in planned if segments is not None) == tiles
        met = {(step.segments.rank_block, step.segments.block_m) for step in lora.variants(rows) if step.segments}
        assert met == {(FEW_RANKS, tiles[0]), (ANY_RANKS, tiles[1])}
