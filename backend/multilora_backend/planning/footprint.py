# SPDX-License-Identifier: Apache-2.0
"""What each adapter takes on the device and in the host cache, known from its config and its file's header."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.cache import default_cache_dir, fetch
from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.extras import extras_host_bytes
from multilora_backend.adapters.layout import host_bytes
from multilora_backend.adapters.peft import check_adapter
from multilora_backend.adapters.pool import PoolSize, too_large
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.room import grains
from multilora_backend.core import LoraSite
from multilora_backend.errors import MultiloraError

SAMPLE_RANKS = (8, 16, 32, 64, 128)
"""Shown beside the ranks that are there, with LoRA on every linear."""


@dataclass(frozen=True)
class Footprint:
    """Of one adapter. Bytes are 0 where there is a reason."""

    name: str
    rank: int = 0
    device_bytes: int = 0
    """In the pool of A and B."""
    extras_bytes: int = 0
    """In the arena of what it has besides them."""
    host_bytes: int = 0
    reason: str = ""
    """Why it cannot be served, or cannot be known yet."""


@dataclass(frozen=True)
class RankRow:
    """Adapters of one rank; if there are none, what one on every linear would take."""

    rank: int
    registered: int
    device_bytes: int
    """Each."""
    device_fit: int
    """So many are on the device at a time, if nothing else is."""
    host_bytes: int
    """Of the largest."""
    host_fit: int


def footprint(
    entry: AdapterEntry,
    sites: Sequence[LoraSite],
    dtype: torch.dtype,
    pool: PoolSize,
    base: BaseModel,
    arena: int,
    pinned: bool,
    max_bytes: int,
) -> Footprint:
    """`arena`: bytes for extras. `pinned`: the host cache is in pinned memory, as with a CUDA device. `max_bytes`: of a
    file."""
    if not entry.source.is_local:
        return Footprint(entry.name, reason=f"{entry.source.text} is fetched when it is first asked for")
    try:
        folder = fetch(entry.source, default_cache_dir(), max_bytes)  # of a local source: checked, and left where it is
        plan = check_adapter(folder, sites, entry.source.inside, base)
    except MultiloraError as error:
        return Footprint(entry.name, reason=error.message)
    except OSError as error:
        return Footprint(entry.name, reason=f"cannot be read: {error.strerror or error}")
    if reason := too_large(pool, arena, plan.rank, plan.extras_bytes):
        return Footprint(entry.name, plan.rank, reason=reason)
    touched = {part.site for part in plan.parts}
    on_host = host_bytes(sites, touched, plan.rank, dtype, pinned) + extras_host_bytes(plan.extras, pinned)
    on_device = padded(plan.rank) * pool.bytes_per_rank
    return Footprint(entry.name, plan.rank, on_device, grains(plan.extras_bytes), on_host)


def by_rank(
    footprints: Iterable[Footprint],
    sites: Sequence[LoraSite],
    dtype: torch.dtype,
    pool: PoolSize,
    host_budget: int,
    pinned: bool,
) -> list[RankRow]:
    """In order of rank."""
    largest = {
        rank: host_bytes(sites, range(len(sites)), rank, dtype, pinned)
        for rank in SAMPLE_RANKS
        if rank <= pool.num_ranks
    }
    counts = dict.fromkeys(largest, 0)
    for each in footprints:
        if not each.reason:
            first = not counts.get(each.rank)
            largest[each.rank] = each.host_bytes if first else max(largest[each.rank], each.host_bytes)
            counts[each.rank] = counts.get(each.rank, 0) + 1
    return [
        RankRow(
            rank=rank,
            registered=counts[rank],
            device_bytes=padded(rank) * pool.bytes_per_rank,
            device_fit=pool.num_ranks // padded(rank),
            host_bytes=largest[rank],
            host_fit=host_budget // largest[rank],
        )
        for rank in sorted(largest)
    ]
