# SPDX-License-Identifier: Apache-2.0
"""The device pool: A and B of every resident adapter, for every site, side by side along the rank dimension."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from multilora_backend.adapters.peft import AdapterWeights
from multilora_backend.adapters.ranks import PAGE, padded
from multilora_backend.core import LoraSite
from multilora_backend.errors import invalid

MAX_RANKS = 4096
"""More ranks than this are not allocated, whatever the budget: a small model would fill it with nothing."""


class DevicePool:
    """Memory only: who may lie where is the manager's business.

    a[site] is `[slices, num_ranks, in_features]`, b[site] `[num_ranks, width]`. An adapter in slot s owns ranks
    rank_start[s] to rank_start[s] + rank[s] of every site; a free slot has rank 0. All memory is initialised, and
    the ranks up to the end of an adapter's last page are zeroed with it: kernels may read them.
    """

    def __init__(
        self,
        sites: Sequence[LoraSite],
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_ranks: int = MAX_RANKS,
    ) -> None:
        """Raises MultiloraError if the budget does not hold one page of 8 ranks."""
        self.device = torch.device(device)
        elements = sum(len(site.modules) * site.in_features + site.width for site in sites)
        self.bytes_per_rank = elements * dtype.itemsize
        ranks = max_ranks if not elements else min(budget_bytes // self.bytes_per_rank, max_ranks)
        self.num_ranks = ranks // PAGE * PAGE
        if self.num_ranks < PAGE:
            need = PAGE * self.bytes_per_rank
            raise invalid("adapter_device_bytes", f"must be at least {need} for {PAGE} ranks, got {budget_bytes}")
        self.a = [
            torch.zeros(len(site.modules), self.num_ranks, site.in_features, dtype=dtype, device=self.device)
            for site in sites
        ]
        self.b = [torch.zeros(self.num_ranks, site.width, dtype=dtype, device=self.device) for site in sites]
        # An adapter takes a page at least, so there are never more of them than pages.
        self.num_slots = self.num_ranks // PAGE
        self.rank_start = np.zeros(self.num_slots, dtype=np.int32)
        self.rank = np.zeros(self.num_slots, dtype=np.int32)

    def can_ever_fit(self, rank: int) -> bool:
        return padded(rank) <= self.num_ranks

    def too_large(self, rank: int) -> str:
        """Why an adapter of this rank can never be resident; empty if it can."""
        if self.can_ever_fit(rank):
            return ""
        need = padded(rank) * self.bytes_per_rank
        return f"rank {rank} needs adapter_device_bytes of {need}; as it is, they hold rank {self.num_ranks}"

    def write(self, weights: AdapterWeights, slot: int, rank_start: int) -> None:
        """Copies an adapter into its ranks and makes the slot point there.

        On CUDA the copies are queued on the current stream, which orders them before the kernels of later steps.
        """
        middle, stop = rank_start + weights.rank, rank_start + padded(weights.rank)
        for a, b, site in zip(self.a, self.b, weights.sites, strict=True):
            if site is None:
                a[:, rank_start:stop].zero_()
                b[rank_start:stop].zero_()
                continue
            a[:, rank_start:middle].copy_(site.a, non_blocking=True)
            b[rank_start:middle].copy_(site.b, non_blocking=True)
            # What an earlier owner left here may be anything.
            a[:, middle:stop].zero_()
            b[middle:stop].zero_()
        self.rank_start[slot] = rank_start
        self.rank[slot] = weights.rank

    def clear(self, slot: int) -> None:
        """The slot has no adapter any more; its ranks keep their bytes until somebody else's are written."""
        self.rank[slot] = 0
        self.rank_start[slot] = 0
