# SPDX-License-Identifier: Apache-2.0
"""The device pool: A and B of every resident adapter, for every site, side by side along the rank dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from multilora_backend.adapters.extras import ExtraKey
from multilora_backend.adapters.extras_pool import ExtrasPool
from multilora_backend.adapters.layout import BUFFER_BYTES, AdapterWeights, allocate, rank_numel
from multilora_backend.adapters.ranks import PAGE, padded
from multilora_backend.adapters.room import extras_can_ever_fit
from multilora_backend.core import LoraSite
from multilora_backend.errors import invalid

MAX_RANKS = 4096
"""More ranks than this are not allocated, whatever the budget: a small model would fill it with nothing."""

STAGING_SHARE = 16
"""A staging buffer may take one part in this many of the budget; a smaller budget goes without."""


@dataclass(frozen=True)
class PoolSize:
    bytes_per_rank: int
    """Over all sites."""
    num_ranks: int
    staging_bytes: int
    """Of the buffer that weights pass through; on CUDA, out of the same budget."""

    @property
    def nbytes(self) -> int:
        return self.num_ranks * self.bytes_per_rank + self.staging_bytes

    @classmethod
    def within(
        cls, budget_bytes: int, sites: Sequence[LoraSite], dtype: torch.dtype, cuda: bool, max_ranks: int = MAX_RANKS
    ) -> PoolSize:
        """Raises MultiloraError if the budget does not hold one page of 8 ranks."""
        bytes_per_rank = sum(rank_numel(site) for site in sites) * dtype.itemsize
        staged = BUFFER_BYTES if cuda and sites and budget_bytes >= BUFFER_BYTES * STAGING_SHARE else 0
        ranks = max_ranks if not sites else min((budget_bytes - staged) // bytes_per_rank, max_ranks)
        num_ranks = ranks // PAGE * PAGE
        if num_ranks < PAGE:
            need = PAGE * bytes_per_rank
            raise invalid("adapter_device_bytes", f"must be at least {need} for {PAGE} ranks, got {budget_bytes}")
        return cls(bytes_per_rank, num_ranks, staged)


def too_large(pool: PoolSize, arena: int, rank: int, extras_bytes: int) -> str:
    """Why an adapter of this rank and extras can never be resident; empty if it can. `arena`: bytes for extras."""
    if not extras_can_ever_fit(extras_bytes, arena):
        return f"what it has besides A and B needs adapter_extras_bytes of {extras_bytes}; they are {arena}"
    if padded(rank) <= pool.num_ranks:
        return ""
    need = padded(rank) * pool.bytes_per_rank
    return f"rank {rank} needs adapter_device_bytes of {need}; as it is, they hold rank {pool.num_ranks}"


@dataclass(frozen=True, eq=False)
class Transfer:
    """A write that may still be under way. Keeps the host memory that is read alive."""

    weights: AdapterWeights
    event: torch.cuda.Event | None
    """Behind the write's last copy; None where copies have ended when they return."""

    def done(self) -> bool:
        """Whether what is launched from now on sees the weights. Raises RuntimeError if the device failed."""
        return self.event is None or self.event.query()


class DevicePool:
    """Memory only: who may lie where is the manager's business.

    a[site] is `[num_ranks * slices, in_features]`, b[site] `[num_ranks, width]`. The adapter in slot s owns ranks
    rank_start[s] to rank_start[s] + padded(rank[s]) of every site, in a as one block that is slice-major inside:
    row (i, j) of its slice i and rank j is rank_start * slices + i * padded(rank) + j. A site with experts has them in
    the place of slices, in b as well. A free slot has rank 0. All memory is initialised, and ranks beyond an adapter's
    own are zero up to the end of its block.
    """

    def __init__(
        self,
        sites: Sequence[LoraSite],
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_ranks: int = MAX_RANKS,
        extra_keys: Sequence[ExtraKey] = (),
        extras_bytes: int = 0,
    ) -> None:
        """Raises MultiloraError if the budget does not hold one page of 8 ranks. `extras_bytes` are a second budget."""
        self.device = torch.device(device)
        cuda = self.device.type == "cuda" and bool(sites)
        self.size = PoolSize.within(budget_bytes, sites, dtype, cuda, max_ranks)
        self.bytes_per_rank, self.num_ranks = self.size.bytes_per_rank, self.size.num_ranks
        widths = [rows * columns for site in sites for rows, columns in site.rank_shapes]
        # One allocation: torch rounds each large one up to 2 MiB, which over 256 tensors would exceed the budget.
        memory = torch.zeros(self.num_ranks * sum(widths), dtype=dtype, device=self.device)
        self._flat = memory.split([self.num_ranks * width for width in widths])
        self.a = [flat.view(-1, site.in_features) for flat, site in zip(self._flat[::2], sites, strict=True)]
        self.b = [flat.view(-1, site.width) for flat, site in zip(self._flat[1::2], sites, strict=True)]
        # An adapter takes a page at least, so there are never more of them than pages.
        self.num_slots = self.num_ranks // PAGE
        self.rank_start = np.zeros(self.num_slots, dtype=np.int32)
        self.rank = np.zeros(self.num_slots, dtype=np.int32)
        self.generation = np.zeros(self.num_slots, dtype=np.int64)
        """Another number for each write, so that copies of what a slot held can be told from what it holds."""
        self.extras = ExtrasPool(extra_keys, extras_bytes, self.num_slots, self.device)
        self.on_experts = np.zeros(self.num_slots, dtype=bool)
        """Whether the adapter acts on experts."""
        self._expert_sites = [index for index, site in enumerate(sites) if site.experts]
        self._writes = 0
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        self._staging = torch.empty(self.size.staging_bytes // dtype.itemsize, dtype=dtype, device=self.device)
        self._blocks = lru_cache(maxsize=64)(self._cut_blocks)
        if self._stream is not None:
            self._warm_up(sites, dtype)

    def too_large(self, rank: int, extras_bytes: int = 0) -> str:
        """Why an adapter of this rank and extras can never be resident; empty if it can."""
        return too_large(self.size, self.extras.nbytes, rank, extras_bytes)

    def write(self, weights: AdapterWeights, slot: int, rank_start: int, extras_start: int = 0) -> Transfer:
        """Copies an adapter into its ranks, its extras to that byte of their arena, and makes the slot point there.

        On CUDA this returns at once: the copies run on a stream of their own, after what the current stream has been
        given so far, since those steps may still read what an evicted adapter left here. Nobody may be given the slot
        before the transfer is done: then no step has to wait on the device. Raises RuntimeError if the device fails.
        """
        event = None
        if self._stream is None:
            self._copy(weights, rank_start)
            self.extras.write(weights.extras, slot, extras_start)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._copy(weights, rank_start)
                self.extras.write(weights.extras, slot, extras_start)
                event = self._stream.record_event()
        self._writes += 1
        self.rank_start[slot] = rank_start
        self.rank[slot] = weights.rank
        self.on_experts[slot] = any(weights.sites[index] is not None for index in self._expert_sites)
        self.generation[slot] = self._writes
        return Transfer(weights, event)

    def clear(self, slot: int) -> None:
        """The slot has no adapter any more; its ranks keep their bytes until somebody else's are written."""
        self.rank[slot] = 0
        self.rank_start[slot] = 0
        self.extras.clear(slot)

    def move(self, slot: int, rank_start: int) -> None:
        """Copies an adapter to other ranks of the pool, and makes its slot point there.

        Call it between steps. The copies are queued on the current stream: steps before them find the adapter where
        it was, those planned afterwards where it is, so it may be in use. What the slot holds stays the same, and so
        does its generation: copies of it elsewhere remain right. Its transfer must be done, and nobody else's ranks
        may be among the new ones; its own may.
        """
        begin, ranks = int(self.rank_start[slot]), padded(int(self.rank[slot]))
        # Pieces no longer than the way, beginning at the end that leads: none is overwritten before it was copied.
        piece = min(ranks, abs(rank_start - begin))
        offsets = range(0, ranks, piece) if piece else range(0)
        for offset in offsets if rank_start < begin else reversed(offsets):
            count = min(piece, ranks - offset)
            sources = self._blocks(begin + offset, count)
            targets = self._blocks(rank_start + offset, count)
            torch._foreach_copy_(list(chain(*targets)), list(chain(*sources)))
        self.rank_start[slot] = rank_start

    def _warm_up(self, sites: Sequence[LoraSite], dtype: torch.dtype) -> None:
        """The first use of a kernel loads it, which may wait for all that runs: so none is used first under load."""
        buffers, weights = allocate(sites, {0}, 1, dtype, pin=True)
        for buffer in buffers:
            buffer.data.zero_()
        self.write(AdapterWeights("", 1, weights, buffers, no_effect=True), slot=0, rank_start=0)
        if self.num_ranks >= 2 * PAGE:
            self.move(slot=0, rank_start=PAGE)
        self.clear(slot=0)
        torch.cuda.synchronize(self.device)

    def _copy(self, weights: AdapterWeights, rank_start: int) -> None:
        blocks = self._blocks(rank_start, padded(weights.rank))
        touched: list[Tensor] = []
        untouched: list[Tensor] = []
        for site, pair in zip(weights.sites, blocks, strict=True):
            (untouched if site is None else touched).extend(pair)
        targets = iter(touched)
        for buffer in weights.buffers:
            source = buffer.data
            # One copy for hundreds of blocks, which are then spread by a few kernels. Buffers follow each other on
            # one stream, so one place is enough; where there is none, or just one block, blocks are copied one by one.
            if len(buffer.sizes) > 1 and len(source) <= len(self._staging):
                source = self._staging[: len(source)].copy_(source, non_blocking=True)
            torch._foreach_copy_(_take(targets, len(buffer.sizes)), source.split(buffer.sizes), non_blocking=True)
        if untouched:
            torch._foreach_zero_(untouched)

    def _cut_blocks(self, rank_start: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
        """Where an adapter's a and b lie, for every site. Cached: 0.4 ms for the 128 sites of an 8B model."""
        blocks = []
        for flat in self._flat:
            width = len(flat) // self.num_ranks
            blocks.append(flat[rank_start * width : (rank_start + ranks) * width])
        return list(zip(blocks[::2], blocks[1::2], strict=True))


def _take(tensors: Iterator[Tensor], count: int) -> list[Tensor]:
    return [next(tensors) for _ in range(count)]
