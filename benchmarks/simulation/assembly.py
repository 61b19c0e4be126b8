# SPDX-License-Identifier: Apache-2.0
"""Puts the parts of an engine together as `Engine` does, over a virtual machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.ranks import padded
from multilora_backend.config import Config
from multilora_backend.core import FinishReason, Sequence
from multilora_backend.scheduling.pages import PageTable
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.scheduler import Scheduler
from simulation.first_come import FirstComeScheduler
from simulation.machine import Clock, VirtualLoader, VirtualPool, sites_of
from simulation.model import TimeModel

if TYPE_CHECKING:
    from simulation.simulator import Setup


@dataclass
class Assembly:
    clock: Clock
    loader: VirtualLoader
    pool: VirtualPool
    manager: AdapterManager
    pages: PageTable
    scheduler: Scheduler | FirstComeScheduler
    ranks: dict[str, int]

    def rank_of(self, key: str) -> int:
        return self.ranks[key]

    def state(self, key: str) -> str:
        return self.manager.records[key].state.value

    def add(self, sequence: Sequence) -> None:
        if sequence.adapter:
            self.manager.hold(sequence.adapter)
        self.scheduler.add(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, reason)
        if sequence.adapter:
            self.manager.drop(sequence.adapter)

    def poll(self) -> None:
        _poll(self.manager)

    @property
    def next_event(self) -> float:
        """When a load makes progress; infinite if none is under way."""
        return min(self.loader.next_event, self.pool.next_event)


def assemble(setup: Setup, model: TimeModel) -> Assembly:
    config = Config.from_mapping({"enable_prefix_caching": False, **setup.settings}, "simulation")
    clock = Clock()
    sites = sites_of()
    ranks = dict(setup.ranks)
    per_rank = sum(len(site.modules) * site.in_features + site.width for site in sites) * 2
    budget = setup.resident * padded(16) * per_rank
    pool = VirtualPool(clock, model, sites, budget, setup.first_come)
    threads = config.adapter_load_threads
    loader = VirtualLoader(clock, model, ranks.__getitem__, per_rank, threads, setup.first_come)
    manager = AdapterManager(
        Catalogue([(name, Path(name)) for name in ranks]),
        sites,
        device_bytes=budget,
        host_bytes=setup.host_bytes,
        dtype=torch.bfloat16,
        device="meta",
        load_threads=threads,
        clock=clock,
        loader=loader,
        pool=pool,
        watched=True,
    )
    manager.check_all()
    _poll(manager)
    pages = PageTable(model.kv_tokens // config.block_size + 1, config.block_size, config.enable_prefix_caching)
    bounds = {
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_loras": config.max_loras,
    }
    if setup.first_come:
        return Assembly(clock, loader, pool, manager, pages, FirstComeScheduler(pages, manager, **bounds), ranks)
    policy = Policy.from_config(config)
    return Assembly(clock, loader, pool, manager, pages, Scheduler(pages, manager, policy, **bounds), ranks)


def _poll(manager: AdapterManager) -> None:
    """Raises RuntimeError if an adapter failed, which a setup with enough room makes none do."""
    polled = manager.poll()
    if polled.failed or polled.moved:
        raise RuntimeError(f"adapters failed: {polled.failed or polled.moved}")
