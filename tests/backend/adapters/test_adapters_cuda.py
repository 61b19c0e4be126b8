# SPDX-License-Identifier: Apache-2.0
"""Copies to the device beside running steps: what is launched waits for nothing, and nobody sees half an adapter."""

from __future__ import annotations

import time

import pytest
import torch

from adapter_bench import Bench, weights_of
from multilora_backend.adapters.layout import AdapterWeights, allocate
from multilora_backend.adapters.peft import read_adapter
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import LoraSite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
]
DTYPE = torch.bfloat16
SITES = [
    LoraSite("qkv", 1000, ("q", "k", "v"), (1000, 120, 120)),
    LoraSite("o", 1000, ("o",), (1000,)),
    LoraSite("gate_up", 1000, ("gate", "up"), (7000, 7000)),
    LoraSite("down", 7000, ("down",), (1000,)),
] * 5
STAGED, UNSTAGED = 2**29, 2**27
"""Budgets with and without room for a staging buffer."""
BUSY_CYCLES = 400_000_000
"""0.2 s at 2 GHz."""


def random_weights(seed: int, rank: int, touched: set[int]) -> AdapterWeights:
    torch.manual_seed(seed)
    buffers, sites = allocate(SITES, touched, rank, DTYPE, pin=True)
    for buffer in buffers:
        buffer.data.normal_()
    return AdapterWeights(str(seed), rank, sites, buffers, no_effect=False)


def holds(pool: DevicePool, weights: AdapterWeights, rank_start: int) -> bool:
    stop = rank_start + padded(weights.rank)
    equal = True
    for site, laid_out, a, b in zip(SITES, weights.sites, pool.a, pool.b, strict=True):
        slices = len(site.modules)
        for ours, theirs in (
            (a[rank_start * slices : stop * slices], None if laid_out is None else laid_out.a),
            (b[rank_start:stop], None if laid_out is None else laid_out.b),
        ):
            equal &= not ours.any() if theirs is None else torch.equal(ours.cpu(), theirs)
    return equal


@pytest.mark.parametrize("to", [0, 8, 48])
def test_a_move_waits_for_nothing_and_steps_see_the_adapter_where_it_was_at_their_launch(to):
    pool, weights = DevicePool(SITES, STAGED, DTYPE, "cuda"), random_weights(1, 24, set(range(len(SITES))))
    transfer = pool.write(weights, slot=1, rank_start=16)
    torch.cuda.synchronize()
    assert transfer.done()
    torch.cuda._sleep(BUSY_CYCLES)
    before = pool.b[0][16:40].clone()
    begin = time.monotonic()
    pool.move(1, to)
    assert time.monotonic() - begin < 0.1
    after = pool.b[0][to : to + 24].clone()
    torch.cuda.synchronize()
    assert torch.equal(before, after)
    assert holds(pool, weights, to)


@pytest.mark.parametrize("budget", [STAGED, UNSTAGED])
def test_writes_do_not_wait_for_steps_and_steps_see_what_they_were_launched_with(budget):
    before = torch.cuda.memory_allocated()
    pool = DevicePool(SITES, budget, DTYPE, "cuda")
    assert torch.cuda.memory_allocated() - before <= budget
    assert pool._staging.numel() == (0 if budget == UNSTAGED else 2**23)
    assert not any(tensor.any() for tensor in [*pool.a, *pool.b])
    for tensor in [*pool.a, *pool.b]:
        tensor.fill_(7)
    written = [
        (random_weights(0, 19, set(range(len(SITES)))), 0),
        (random_weights(1, 3, {0, 3, 10}), 24),
        (random_weights(2, 256, set(range(0, len(SITES), 2))), 40),
    ]
    assert len(written[2][0].buffers) > 1
    stop = 40 + 256
    torch.cuda.synchronize()

    torch.cuda._sleep(BUSY_CYCLES)
    seen = [b[:stop].clone() for b in pool.b]  # a step that was launched before
    begin = time.perf_counter()
    transfers = [pool.write(weights, slot, start) for slot, (weights, start) in enumerate(written)]
    seconds = time.perf_counter() - begin
    assert not any(transfer.done() for transfer in transfers)
    assert not torch.cuda.current_stream().query()
    assert seconds < 0.1

    torch.cuda.synchronize()
    assert all(transfer.done() for transfer in transfers)
    assert all((b == 7).all() for b in seen)
    for weights, start in written:
        assert holds(pool, weights, start)
    for tensor, slices in [(pool.a[2], 2), (pool.b[2], 1)]:
        assert (tensor[stop * slices :] == 7).all()


def test_nothing_of_a_later_step_waits_for_a_write():
    pool = DevicePool(SITES, STAGED, DTYPE, "cuda")
    weights = random_weights(0, 64, set(range(len(SITES))))
    torch.ones(3, device="cuda").sum()  # loads the kernels, which would wait
    # The copy stream is busy; the step's own stream must not be.
    with torch.cuda.stream(pool._stream):
        torch.cuda._sleep(BUSY_CYCLES)
    transfer = pool.write(weights, 0, 0)
    step = torch.ones(3, device="cuda").sum()
    torch.cuda.current_stream().synchronize()
    assert float(step) == 3
    assert not transfer.done()
    while not transfer.done():
        time.sleep(0.001)
    assert holds(pool, weights, 0)


def test_active_only_when_arrived():
    bench = Bench({"a": 8, "b": 5}, device="cuda")
    manager = bench.manager
    bench.activate("a")
    held = manager.lease("a")
    manager.request("b")
    bench.loader.run()
    torch.cuda._sleep(BUSY_CYCLES)
    assert not manager.poll().failed
    assert bench.state("b") is AdapterState.LOADING
    assert manager.transferring
    assert manager.lease("b") is None
    assert list(manager.resident()) == ["a"]
    torch.cuda.synchronize()
    assert not manager.poll().failed
    assert not manager.transferring
    lease = manager.lease("b")
    for name, own in (("a", held), ("b", lease)):
        site = weights_of(name, own.rank).sites[0]
        assert torch.equal(manager.pool.a[0][own.rank_start :][:8].cpu(), site.a)
        assert torch.equal(manager.pool.b[0][own.rank_start :][:8].cpu(), site.b)


def test_what_is_read_for_the_device_is_pinned_and_counted_as_allocated(save, sites):
    weights = read_adapter(save(r=11), sites, torch.float32, pin=True)
    plain = read_adapter(save(r=11), sites, torch.float32)
    assert all(buffer.data.is_pinned() for buffer in weights.buffers)
    assert not any(buffer.data.is_pinned() for buffer in plain.buffers)
    for pinned, other in zip(weights.buffers, plain.buffers, strict=True):
        assert torch.equal(pinned.data, other.data)
        assert pinned.nbytes & (pinned.nbytes - 1) == 0
        assert other.nbytes <= pinned.nbytes < 2 * other.nbytes
