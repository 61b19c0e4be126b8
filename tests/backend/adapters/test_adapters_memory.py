# SPDX-License-Identifier: Apache-2.0
"""Ten thousand loads and unloads: every byte comes back."""

from __future__ import annotations

import gc
import random
import sys
from pathlib import Path

import torch

from multilora_backend.adapters.compaction import plan_room
from multilora_backend.adapters.host import HostCache
from multilora_backend.adapters.peft import read_adapter
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import PAGE, Places

CYCLES, WARM_UP = 10_000, 1_000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Levels:
    """Disk, host and device without their manager: loads at random ranks, with evictions, moves and unloads."""

    def __init__(self, sites, folders: list[Path]) -> None:
        self.sites, self.folders = sites, folders
        self.pool = DevicePool(sites, 2**21, torch.float32, "cpu", max_ranks=10 * PAGE)
        self.places = Places(self.pool.num_ranks)
        self.host = HostCache(2**18)
        self.random = random.Random(1)
        self.versions: dict[Path, str] = {}
        self.used: dict[str, float] = {}
        self.reads = self.moves = self.evictions = 0

    def cycle(self, now: int) -> None:
        folder = self.random.choice(self.folders)
        weights = self.host.get(self.versions.get(folder, ""))
        if weights is None:
            self.reads += 1
            weights = read_adapter(folder, self.sites, torch.float32)
            self.versions[folder] = weights.version
            self.host.put(weights, 0.1)
        name = folder.name
        if self.places.get(name) is None:
            room = plan_room(self.places.spans, self.places.num_ranks, weights.rank, self.used)
            assert room is not None
            for victim in room.evict:
                self.evictions += 1
                self.unload(victim)
            for shift in room.shifts:
                self.moves += 1
                place = self.places.move(shift.name, shift.start)
                self.pool.move(place.slot, place.rank_start)
            place = self.places.claim(name, weights.rank)
            assert self.pool.write(weights, place.slot, place.rank_start).done()
        self.used[name] = float(now)
        if self.random.random() < 0.5:
            self.unload(name)
        if self.random.random() < 0.05:
            self.host.remove(weights.version)

    def unload(self, name: str) -> None:
        del self.used[name]
        self.pool.clear(self.places.free(name).slot)

    def clear(self) -> None:
        for name in list(self.used):
            self.unload(name)
        for version in list(self.host):
            assert self.host.remove(version)


def test_memory_after_ten_thousand_cycles_is_what_it_was(save, sites):
    ranks = (1, 4, 8, 12, 16, 24, 30, 32)
    levels = Levels(sites, [save(f"a{rank}", r=rank) for rank in ranks])
    for now in range(WARM_UP):
        levels.cycle(now)
    levels.clear()
    gc.collect()
    blocks, resident = sys.getallocatedblocks(), resident_bytes()
    for now in range(WARM_UP, CYCLES):
        levels.cycle(now)
    levels.clear()
    gc.collect()
    grown = sys.getallocatedblocks() - blocks
    assert min(levels.reads, levels.moves, levels.evictions) > 500
    assert levels.host.nbytes == levels.host.held_bytes == len(levels.host) == 0
    assert levels.places.num_free == levels.places.num_ranks
    assert not levels.pool.rank.any()
    # Python's own objects, by number; then all of it, as the system counts.
    assert grown < 1_000
    assert resident_bytes() - resident < 0.01 * resident
