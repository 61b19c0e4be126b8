# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a step use which adapter, as the kernels want it: planned on the host, copied once.

A *group* is the tokens of one adapter, or those without one; a *tile* is at most `block_m` tokens of one group. Every
token is in exactly one tile, so that a kernel which fuses LoRA into base work finds all its rows in the tiles. Tiles
exist only for tokens that are there: no grid grows with the number of resident or registered adapters.
Planning needs numpy only; torch is imported when a plan goes to a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from multilora_kernels.variants import ANY_RANKS, BLOCK_M_CHOICES, block_m_for, rank_block_for

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

NO_ADAPTER = -1
NO_TOKEN = -1
TILE_FIELDS = 8
"""int32 words of a tile: first, end, rank_start, rank, h_start, h_stride, slot and a zero, 32 bytes in all."""
TILE_SLOT = 6
RANK_PAGE = 8
"""Ranks are handed out in pages of 8, so that a row of 16-bit ranks is a whole number of 16-byte loads."""


def padded_rank(rank: int) -> int:
    """The ranks that an adapter occupies in a pool: whole pages."""
    return -(-rank // RANK_PAGE) * RANK_PAGE


def max_tiles(num_tokens: int, num_groups: int, block_m: int) -> int:
    """Most tiles that `num_tokens` can need if they are of at most `num_groups` groups (adapters, and one for none)."""
    groups = min(num_tokens, num_groups)
    return groups + (num_tokens - groups) // block_m


def max_packed(num_tokens: int, num_groups: int) -> int:
    """Most int32 words of a plan for up to `num_tokens` tokens of at most `num_groups` groups, cut by block_m_for."""
    sizes = [block_m for block_m in BLOCK_M_CHOICES if block_m <= block_m_for(num_tokens, 1, ANY_RANKS)]
    # Above 16 rows a tile is at most twice what a group has on average; a captured step, which is cut before its groups
    # are known, may have one group more.
    groups = [num_groups, *(min(num_groups, -(-2 * num_tokens // block_m)) for block_m in sizes[1:])]
    return max(max_tiles(num_tokens, n, m) * (TILE_FIELDS + m) for n, m in zip(groups, sizes, strict=True))


def _packed(num_tiles: int, block_m: int) -> NDArray[np.int32]:
    """Empty tiles."""
    packed = np.full((TILE_FIELDS + block_m) * num_tiles, NO_TOKEN, np.int32)
    packed[: TILE_FIELDS * num_tiles] = 0
    return packed


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """One packed int32 buffer, tiles | rows, and the numbers that the host needs to launch.

    A tile of all zeros is empty (no row lies between its first and its end, and its rows have no tokens): a buffer for
    a captured graph is filled up with them.
    """

    packed: NDArray[np.int32]
    """[(8 + block_m) * num_tiles]; tiles come first so that they are aligned to 32 bytes."""
    num_tiles: int
    num_tokens: int
    """T: all tokens of the step, with and without adapter."""
    block_m: int
    rank_block: int
    """FEW_RANKS or ANY_RANKS: the kind of kernel that runs under this plan. A captured graph fixes it."""
    max_rank: int
    """Largest rank in the step, 0 if no token has an adapter."""
    active: tuple[int, ...]
    """Slots of the adapters in the step, ascending."""

    @property
    def tiles(self) -> NDArray[np.int32]:
        """[num_tiles, 8]: first sorted row, row after the last, rank_start, rank, h_start, h_stride, slot, 0.

        rank_start is the adapter's first rank in the pools and rank its true rank (0: tokens without adapter).
        Slice i and rank j of its h lie in column h_start * slices + i * h_stride + j.
        """
        return self.packed[: TILE_FIELDS * self.num_tiles].reshape(-1, TILE_FIELDS)

    @property
    def h_ranks(self) -> int:
        """Columns of a slice in grouped_shrink's h: the largest rank in whole rank blocks."""
        return -(-self.max_rank // self.rank_block) * self.rank_block

    @property
    def rows(self) -> NDArray[np.int32]:
        """[num_tiles, block_m]: the tokens of each tile's rows, -1 behind the last of them."""
        return self.packed[TILE_FIELDS * self.num_tiles :].reshape(-1, self.block_m)

    @property
    def order(self) -> NDArray[np.int32]:
        """[T]: the token of each sorted row."""
        return self.rows[self.rows >= 0]

    @cached_property
    def group_tiles(self) -> NDArray[np.intp]:
        """[adapters in the step]: the first tile of each."""
        own = np.flatnonzero(self.tiles[:, 3] > 0)
        return own[np.flatnonzero(np.diff(self.tiles[own, 2], prepend=-1))]

    @cached_property
    def groups(self) -> NDArray[np.int32]:
        """[adapters in the step, 8]: the tiles of each adapter as one. None for tokens without."""
        groups = self.tiles[self.group_tiles]
        last = np.append(self.group_tiles[1:], np.count_nonzero(self.tiles[:, 1]))[: len(groups)] - 1
        groups[:, 1] = self.tiles[last, 1]
        return groups

    def pad_to(self, num_tiles: int) -> SegmentPlan:
        """The same plan with empty tiles behind its own, so that buffers of one size hold every step of a graph.

        Raises:
            ValueError: the plan has more tiles than that.
        """
        if num_tiles < self.num_tiles:
            raise ValueError(f"num_tiles: the plan has {self.num_tiles} tiles, {num_tiles} cannot hold them")
        packed = _packed(num_tiles, self.block_m)
        own, border = TILE_FIELDS * self.num_tiles, TILE_FIELDS * num_tiles
        packed[:own] = self.packed[:own]
        packed[border : border + self.block_m * self.num_tiles] = self.packed[own:]
        return replace(self, packed=packed, num_tiles=num_tiles)

    def to(self, device: torch.device | str) -> Segments:
        """Copies the packed buffer to the device: on CUDA one asynchronous copy from pinned memory."""
        import torch

        packed = torch.from_numpy(self.packed)
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory()
        return self.views(packed.to(device, non_blocking=True))

    def views(self, packed: torch.Tensor) -> Segments:
        """The plan's tensors inside `packed`, an int32 tensor that holds (a copy of) the packed buffer."""
        border = TILE_FIELDS * self.num_tiles
        return Segments(self, packed[:border].view(-1, TILE_FIELDS), packed[border:].view(-1, self.block_m))


@dataclass(frozen=True, eq=False)
class Segments:
    """A plan and its tensors on a device; shapes as in SegmentPlan.

    Kernels read the tensors, and of the plan block_m and rank_block (grouped_shrink h_ranks instead). The tensors may
    be views of a static buffer that is overwritten from step to step, as long as those numbers stay true. References
    read rows, and else the plan.
    """

    plan: SegmentPlan
    tiles: torch.Tensor
    rows: torch.Tensor

    def by_adapter(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Each adapter's tiles as one, as in `SegmentPlan.groups`, and its tokens: what the references go through.

        All but an adapter's last tile are full, so its tokens lie together, and nothing is asked of the device.
        """
        tokens, block_m = self.rows.view(-1), self.plan.block_m
        for group, tile in zip(self.plan.groups.tolist(), self.plan.group_tiles.tolist(), strict=True):
            yield group, tokens[tile * block_m :][: group[1] - group[0]]


def plan_segments(
    rows: NDArray[np.int32],
    rank_start: NDArray[np.int32],
    rank: NDArray[np.int32],
    block_m: int,
    h_start: NDArray[np.int32] | None = None,
) -> SegmentPlan:
    """Sorts a step's tokens by adapter, stably and those without one first, and cuts each group into tiles.

    Args:
        rows: [T] adapter slot of each token, NO_ADAPTER for none.
        rank_start: [S] first rank of each slot's adapter in the pools.
        rank: [S] its true rank; tokens of a slot with rank 0 count as tokens without adapter.
        block_m: most tokens in a tile, one of BLOCK_M_CHOICES.
        h_start: [S] offset of each slot's ranks in h when h is the border of a base linear's output, where an adapter
            of rank r has padded_rank(r) columns a slice. None: h comes from grouped_shrink.

    Raises:
        ValueError: a slot or block_m is out of range, or rank_start, rank and h_start differ in length.
    """
    if block_m not in BLOCK_M_CHOICES:
        raise ValueError(f"block_m: must be one of {BLOCK_M_CHOICES}, got {block_m}")
    if rank_start.shape != rank.shape:
        raise ValueError(f"rank: must have rank_start's shape {rank_start.shape}, got {rank.shape}")
    if h_start is not None and h_start.shape != rank.shape:
        raise ValueError(f"h_start: must have rank's shape {rank.shape}, got {h_start.shape}")
    num_tokens, num_slots = rows.size, rank.size
    if num_tokens and not (rows.min() >= NO_ADAPTER and rows.max() < num_slots):
        raise ValueError(f"rows: slots must be in [-1, {num_slots}), got {rows.min()} to {rows.max()}")

    # NO_ADAPTER finds the last slot's rank, and stays NO_ADAPTER whichever way the comparison goes.
    slots = np.where(rank[rows] > 0, rows, NO_ADAPTER) if num_slots else rows
    # numpy sorts 16-bit keys by radix, five times faster at 8,192 tokens.
    keys = slots.astype(np.int16) if num_slots <= 2**15 else slots
    order = keys.argsort(kind="stable")
    slots = slots[order]

    first = np.empty(0, np.int64)
    if num_tokens:
        first = np.append(0, np.flatnonzero(slots[1:] != slots[:-1]) + 1)
    last = np.append(first[1:], num_tokens)[: first.size]
    group_slots = slots[first]
    groups = np.zeros((first.size, TILE_FIELDS), np.int32)
    has_adapter = int(first.size > 0 and group_slots[0] < 0)
    groups[:, 0], groups[:, 1] = first, last
    active = group_slots[has_adapter:]
    ranks = rank[active]
    max_rank = int(ranks.max()) if active.size else 0
    rank_block = rank_block_for(max_rank)
    fields = groups[has_adapter:]
    fields[:, 2], fields[:, 3], fields[:, TILE_SLOT] = rank_start[active], ranks, active
    if h_start is None:
        fields[:, 5] = -(-max_rank // rank_block) * rank_block
    else:
        fields[:, 4], fields[:, 5] = h_start[active], -(-ranks // RANK_PAGE) * RANK_PAGE

    tiles = groups
    tiles_per_group = -(-(last - first) // block_m)
    num_tiles = int(tiles_per_group.sum())
    if num_tiles > first.size:
        tiles = groups.repeat(tiles_per_group, axis=0)
        index_in_group = np.arange(num_tiles) - (tiles_per_group.cumsum() - tiles_per_group).repeat(tiles_per_group)
        tiles[:, 0] += (index_in_group * block_m).astype(np.int32)
        np.minimum(tiles[:, 0] + block_m, tiles[:, 1], out=tiles[:, 1])

    packed = _packed(num_tiles, block_m)
    packed[: TILE_FIELDS * num_tiles] = tiles.reshape(-1)
    # Sorted row j of tile t lies at t * block_m + j - first[t].
    places = np.arange(num_tiles) * block_m - tiles[:, 0]
    packed[TILE_FIELDS * num_tiles + np.arange(num_tokens) + places.repeat(tiles[:, 1] - tiles[:, 0])] = order
    return SegmentPlan(packed, num_tiles, num_tokens, block_m, rank_block, max_rank, tuple(active.tolist()))
