# SPDX-License-Identifier: Apache-2.0
"""Tiles of visits to experts: each visit once, with its own adapter's part for its own expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multilora_kernels import (
    Delta,
    Segments,
    grouped_expand,
    grouped_shrink,
    padded_rank,
    plan_segments,
    routed_segments,
    routed_segments_reference,
)
from multilora_kernels.routed import _on_device

RANKS = (3, 8, 17, 40)
STARTS = np.array([16, 0, 48, 80], np.int32)
"""Not in the order of the slots."""
NUM_RANKS = 128


def step_of(slots: list[int], empty_tiles: int = 0, h_start: np.ndarray | None = None) -> Segments:
    plan = plan_segments(np.array(slots, np.int32), STARTS, np.array(RANKS, np.int32), 16, h_start)
    return plan.pad_to(plan.num_tiles + empty_tiles).to("cpu")


def visits_of(chosen: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and expert of each visit, sorted by expert as the model has them."""
    experts, order = torch.tensor(chosen).view(-1).sort(stable=True)
    return order // len(chosen[0]), experts


def by_block(segments: Segments) -> dict[tuple[int, int], list[int]]:
    """Visits of each (first row in the pool, rank), in order; every tile is checked."""
    found: dict[tuple[int, int], list[int]] = {}
    order = segments.rows[segments.rows >= 0].tolist()
    for first, end, start, rank, h_start, h_stride, *_ in segments.tiles.tolist():
        assert 0 <= end - first <= segments.plan.block_m
        if end > first:
            assert h_start == 0
            assert not rank or h_stride == segments.plan.h_ranks >= rank
            found.setdefault((start if rank else 0, rank), []).extend(order[first:end])
    return found


@given(st.data())
def test_both_ways_make_tiles_of_the_same_visits(data: st.DataObject):
    num_experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, num_experts))
    slots = data.draw(st.lists(st.integers(-1, len(RANKS) - 1), min_size=1, max_size=60))
    choice = st.permutations(range(num_experts)).map(lambda experts: experts[:top_k])
    tokens, experts = visits_of(data.draw(st.lists(choice, min_size=len(slots), max_size=len(slots))))
    h_start = data.draw(st.sampled_from([None, np.array([0, 8, 16, 40], np.int32)]))
    segments = step_of(slots, data.draw(st.integers(0, 3)), h_start)
    expected: dict[tuple[int, int], list[int]] = {}
    for visit, (token, expert) in enumerate(zip(tokens.tolist(), experts.tolist(), strict=True)):
        slot = slots[token]
        rank = RANKS[slot] if slot >= 0 else 0
        start = int(STARTS[slot]) * num_experts + expert * padded_rank(rank) if rank else 0
        expected.setdefault((start, rank), []).append(visit)
    for make in (_on_device, routed_segments_reference):
        made = make(segments, tokens, experts, num_experts)
        assert by_block(made) == expected, make.__name__
        assert made.plan.num_tokens == len(tokens)
        assert made.plan.max_rank == segments.plan.max_rank


def test_kernels_add_each_visits_own_part(target):
    """NaN wherever no adapter of the step lies, and in other experts' parts that nobody visits."""
    generator = torch.Generator().manual_seed(0)
    num_experts, top_k, k, width = 5, 2, 70, 33
    slots = [2, -1, 0, 0, 1, 2, -1, 1, 0, 2] * 4
    chosen = [torch.randperm(num_experts - 1, generator=generator)[:top_k].tolist() for _ in slots]
    tokens, experts = visits_of(chosen)
    a = torch.full((NUM_RANKS * num_experts, k), torch.nan)
    b = torch.full((NUM_RANKS * num_experts, width), torch.nan)
    for slot in set(slots) - {-1}:
        for expert in range(num_experts - 1):
            start = STARTS[slot] * num_experts + expert * padded_rank(RANKS[slot])
            for pool in (a, b):
                pool[start : start + padded_rank(RANKS[slot])] = 0
                block = pool[start : start + RANKS[slot]]
                block.copy_(torch.randn(block.shape, generator=generator))
    x, y = torch.randn(len(tokens), k, generator=generator), torch.randn(len(tokens), width, generator=generator)
    a, b, x, y = (tensor.to(target.device, target.dtype) for tensor in (a, b, x, y))
    step = step_of(slots)
    segments = Segments(step.plan, step.tiles.to(target.device), step.rows.to(target.device))
    visits = routed_segments(segments, tokens.to(target.device), experts.to(target.device), num_experts)
    out = y.clone()
    grouped_expand(out, Delta(grouped_shrink(x, a, 1, visits), b, visits), (width,))
    for visit, (token, expert) in enumerate(zip(tokens.tolist(), experts.tolist(), strict=True)):
        slot = slots[token]
        if slot < 0:
            assert torch.equal(out[visit], y[visit])
            continue
        start = int(STARTS[slot]) * num_experts + expert * padded_rank(RANKS[slot])
        own = slice(start, start + RANKS[slot])
        expected = y[visit].double() + (a[own].double() @ x[visit].double()) @ b[own].double()
        size = y[visit].abs().double() + (a[own].abs().double() @ x[visit].abs().double()) @ b[own].abs().double()
        bound = (k + RANKS[slot]) * torch.finfo(torch.float32).eps + 2 * torch.finfo(target.dtype).eps
        assert ((out[visit].double() - expected).abs() <= bound * size).all()


@pytest.mark.parametrize("slots", [[-1, -1], [0], [1] * 70])
def test_steps_of_one_kind(slots: list[int]):
    tokens, experts = visits_of([[1, 0]] * len(slots))
    for make in (_on_device, routed_segments_reference):
        made = by_block(make(step_of(slots), tokens, experts, 2))
        assert sorted(visit for visits in made.values() for visit in visits) == list(range(len(tokens)))
        assert len(made) == (1 if slots[0] < 0 else 2)


@pytest.mark.parametrize(("slots", "block_m"), [([0, 1], 16), ([0, 3], 32)], ids=["few ranks", "any ranks"])
def test_many_visits_have_tiles_as_their_ranks_want_them(slots: list[int], block_m: int):
    segments = step_of(slots * 250)
    tokens, experts = visits_of([[0, 1, 2]] * 500)
    for make in (_on_device, routed_segments_reference):
        assert make(segments, tokens, experts, 3).plan.block_m == block_m, make.__name__
