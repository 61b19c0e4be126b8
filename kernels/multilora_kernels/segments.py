# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a step use which adapter, as the grouped kernels want it: planned on the host, copied once.

A *group* is the tokens of one adapter, a *tile* at most `block_m` tokens of one group. Tiles exist only for tokens
that are there, so the kernels' grids do not grow with the number of resident or registered adapters.
Planning needs numpy only; torch is imported when a plan goes to a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

NO_ADAPTER = -1
BLOCK_M_CHOICES = (16, 32, 64, 128)
"""tl.dot needs at least 16 rows; from 64 on Hopper uses wgmma."""
SMALL_BLOCK_M = 16
LARGE_BLOCK_M = 64
MAX_BLOCK_R = 64
"""Most ranks in one program's block; larger ranks are several blocks."""


def block_m_for(num_tokens: int, num_adapters: int) -> int:
    """16 while an adapter has few tokens (decode), where larger tiles would be mostly empty; 64 for prefill.

    Not tuned: the border is where a tile of 64 is half full on average.
    """
    return SMALL_BLOCK_M if num_tokens <= 32 * max(num_adapters, 1) else LARGE_BLOCK_M


def rank_blocks(max_rank: int) -> tuple[int, int]:
    """(ranks in a block, ranks in h): h's rows are whole blocks, so that they are read as vectors without a mask."""
    block = 16 if max_rank <= 16 else 32 if max_rank <= 32 else MAX_BLOCK_R
    return block, (max_rank + block - 1) // block * block


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """One packed int32 buffer, tiles | groups | order, and the numbers that the host needs to launch.

    A record of all zeros in `tiles` is a tile with nothing to do, so that a buffer for a captured graph can be padded.
    """

    packed: NDArray[np.int32]
    """[4 * num_tiles + 4 * num_groups + num_tokens]; tiles come first so that records are 16-byte aligned."""
    num_tiles: int
    num_groups: int
    num_tokens: int
    """M: tokens with an adapter of rank > 0."""
    block_m: int
    max_rank: int
    """Largest rank among the groups, 0 if there are none."""

    @property
    def tiles(self) -> NDArray[np.int32]:
        """[num_tiles, 4]: first sorted row, row after the last, rank_start, rank. One load tells a program all."""
        return self.packed[: 4 * self.num_tiles].reshape(-1, 4)

    @property
    def groups(self) -> NDArray[np.int32]:
        """[num_groups, 4]: first sorted row, row after the last, rank_start, rank."""
        return self.packed[4 * self.num_tiles : 4 * (self.num_tiles + self.num_groups)].reshape(-1, 4)

    @property
    def order(self) -> NDArray[np.int32]:
        """[M]: the token of each sorted row."""
        return self.packed[4 * (self.num_tiles + self.num_groups) :]

    def to(self, device: torch.device | str) -> Segments:
        """Copies the packed buffer to the device: on CUDA one asynchronous copy from pinned memory."""
        import torch

        packed = torch.from_numpy(self.packed)
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory()
        return self.views(packed.to(device, non_blocking=True))

    def views(self, packed: torch.Tensor) -> Segments:
        """The plan's tensors inside `packed`, an int32 tensor that holds (a copy of) the packed buffer."""
        num_records = self.num_tiles + self.num_groups
        records = packed[: 4 * num_records].view(-1, 4)
        order = packed[4 * num_records : 4 * num_records + self.num_tokens]
        return Segments(self, records[: self.num_tiles], records[self.num_tiles :], order)


@dataclass(frozen=True, eq=False)
class Segments:
    """A plan and its tensors on a device; shapes as in SegmentPlan."""

    plan: SegmentPlan
    tiles: torch.Tensor
    groups: torch.Tensor
    order: torch.Tensor


def plan_segments(
    rows: NDArray[np.int32], rank_start: NDArray[np.int32], rank: NDArray[np.int32], block_m: int
) -> SegmentPlan:
    """Sorts a step's tokens by adapter, stably, and cuts each adapter's tokens into tiles.

    Args:
        rows: [T] adapter slot of each token, NO_ADAPTER for none.
        rank_start: [S] offset of each slot's ranks in the rank pool.
        rank: [S] rank of each slot's adapter; tokens of a slot with rank 0 are dropped like those without adapter.
        block_m: most tokens in a tile, one of BLOCK_M_CHOICES.

    Raises:
        ValueError: a slot or block_m is out of range, or rank_start and rank differ in length.
    """
    if block_m not in BLOCK_M_CHOICES:
        raise ValueError(f"block_m: must be one of {BLOCK_M_CHOICES}, got {block_m}")
    if rank_start.shape != rank.shape:
        raise ValueError(f"rank: must have rank_start's shape {rank_start.shape}, got {rank.shape}")
    if rows.size and not (rows.min() >= NO_ADAPTER and rows.max() < rank.size):
        raise ValueError(f"rows: slots must be in [-1, {rank.size}), got {rows.min()} to {rows.max()}")

    # The appended 0 is what NO_ADAPTER, index -1, finds: a token without adapter has rank 0.
    has_delta = np.append(rank, 0)[rows] > 0
    tokens = np.flatnonzero(has_delta)
    order = tokens[np.argsort(rows[tokens], kind="stable")]
    slots = rows[order]

    first = np.flatnonzero(np.diff(slots, prepend=NO_ADAPTER))
    last = np.append(first[1:], order.size)[: first.size]
    group_slots = slots[first]
    groups = np.stack([first, last, rank_start[group_slots], rank[group_slots]], axis=1)

    tiles_per_group = -(-(last - first) // block_m)
    tiles = np.repeat(groups, tiles_per_group, axis=0)
    index_in_group = np.arange(len(tiles)) - np.repeat(np.cumsum(tiles_per_group) - tiles_per_group, tiles_per_group)
    tiles[:, 0] += index_in_group * block_m
    tiles[:, 1] = np.minimum(tiles[:, 0] + block_m, tiles[:, 1])

    return SegmentPlan(
        packed=np.concatenate([tiles.ravel(), groups.ravel(), order]).astype(np.int32),
        num_tiles=len(tiles),
        num_groups=len(groups),
        num_tokens=order.size,
        block_m=block_m,
        max_rank=int(groups[:, 3].max(initial=0)),
    )
