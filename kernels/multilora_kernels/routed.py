# SPDX-License-Identifier: Apache-2.0
"""Segments of visits: in a mixture of experts a token visits a few of them, and LoRA differs by adapter and expert.

The kernels of linears serve experts as they are: an adapter's block in a pool of experts is expert after expert, so
each expert's part of it is a block of its own, of one slice. What they need is tiles of visits that share adapter and
expert. Who visits whom is known on the device alone, so the tiles are made there, in tensors of fixed shapes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from multilora_kernels._triton import use_kernel
from multilora_kernels.segments import (
    NO_ADAPTER,
    NO_TOKEN,
    RANK_PAGE,
    TILE_FIELDS,
    SegmentPlan,
    Segments,
    max_tiles,
    padded_rank,
    plan_segments,
)
from multilora_kernels.variants import block_m_for


def routed_segments(segments: Segments, tokens: Tensor, experts: Tensor, num_experts: int) -> Segments:
    """Segments whose tokens are the visits, for grouped_shrink and grouped_expand with one slice.

    Args:
        segments: of the step's tokens, by adapter, in pools of linears: T tokens.
        tokens: int64 [P], the token of each visit.
        experts: int64 [P], its expert, 0 to num_experts - 1.
        num_experts: the pools of experts are `[R * num_experts, columns]`, and an adapter whose block begins at
            rank_start in other pools has expert e's at row rank_start * num_experts + e * padded_rank(rank) there.

    Made on the device where kernels run, without asking it anything; else by the reference.
    """
    if not use_kernel(experts):
        return routed_segments_reference(segments, tokens, experts, num_experts)
    return _on_device(segments, tokens, experts, num_experts)


def _on_device(segments: Segments, tokens: Tensor, experts: Tensor, num_experts: int) -> Segments:
    plan, visits, device = segments.plan, len(experts), experts.device
    block_m = block_m_for(visits, num_experts, plan.rank_block)
    num_tiles = max_tiles(visits, 1 + plan.num_tiles * num_experts, block_m)
    # Every token lies in one tile, which knows its adapter; what is no token lands behind them.
    own = torch.empty(plan.num_tokens + 1, 2, dtype=torch.int64, device=device)
    at = torch.where(segments.rows >= 0, segments.rows, plan.num_tokens).long()
    own[at] = segments.tiles[:, None, 2:4].long().expand(-1, plan.block_m, -1)
    rank_start, rank = own[tokens].unbind(1)
    padded = (rank + RANK_PAGE - 1) // RANK_PAGE * RANK_PAGE
    block = torch.where(rank > 0, rank_start * num_experts + experts * padded, NO_ADAPTER)
    block, order = block.sort(stable=True)

    place = torch.arange(visits, device=device)
    changes = torch.ones(visits, dtype=torch.bool, device=device)
    changes[1:] = block[1:] != block[:-1]
    first = torch.where(changes, place, 0).cummax(0).values
    begins = changes | ((place - first) % block_m == 0)
    ends = torch.ones_like(begins)
    ends[:-1] = begins[1:]
    tile = begins.cumsum(0) - 1
    # A row behind the last tile takes what is no beginning or no end: masks would need their count on the host.
    tiles = torch.zeros(num_tiles + 1, TILE_FIELDS, dtype=torch.int32, device=device)
    at = torch.where(begins, tile, num_tiles)
    for field, value in ((0, place), (2, block.clamp_min(0)), (3, rank[order])):
        tiles[at, field] = value.int()
    tiles[torch.where(ends, tile, num_tiles), 1] = (place + 1).int()
    tiles[:, 5] = plan.h_ranks
    made = SegmentPlan(
        np.empty(0, np.int32), num_tiles, visits, block_m, plan.rank_block, plan.max_rank, active=plan.active
    )
    rows = torch.full((num_tiles, block_m), NO_TOKEN, dtype=torch.int32, device=device)
    rows.view(-1)[tile * block_m + (place - first) % block_m] = order.int()
    return Segments(made, tiles[:num_tiles], rows)


def routed_segments_reference(segments: Segments, tokens: Tensor, experts: Tensor, num_experts: int) -> Segments:
    """What routed_segments makes, planned on the host: adapters and experts are so many slots. Any device."""
    plan, groups = segments.plan, segments.plan.groups
    owner = np.full(plan.num_tokens, NO_ADAPTER, np.int64)
    for index, (first, end) in enumerate(groups[:, :2].tolist()):
        owner[plan.order[first:end]] = index
    owner = owner[tokens.cpu().numpy()]
    slots = np.where(owner >= 0, owner * num_experts + experts.cpu().numpy(), NO_ADAPTER).astype(np.int32)
    rank = groups[:, 3].repeat(num_experts)
    padded = np.array([padded_rank(int(r)) for r in groups[:, 3]], np.int32)
    start = groups[:, 2, None] * num_experts + padded[:, None] * np.arange(num_experts, dtype=np.int32)
    block_m = block_m_for(len(slots), num_experts, plan.rank_block)
    return plan_segments(slots, start.reshape(-1).astype(np.int32), rank, block_m).to(experts.device)
