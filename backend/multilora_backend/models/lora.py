# SPDX-License-Identifier: Apache-2.0
"""How LoRA is computed: strategies behind one interface, chosen by name.

Every strategy adds, for each row with an adapter, `B (A x)` of that adapter at its own rank, slice by slice,
and leaves rows without one untouched bit for bit. They share the metadata of `multilora_kernels.segments`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from multilora_backend.adapters.pool import DevicePool
from multilora_backend.core import LoraSite
from multilora_backend.models.batch import Batch
from multilora_kernels import (
    Segments,
    block_m_for,
    grouped_expand,
    grouped_expand_reference,
    grouped_shrink,
    grouped_shrink_reference,
    plan_segments,
    splits_for,
)


class LoraStrategy(Protocol):
    def plan(self, batch: Batch) -> None:
        """Host metadata for a step: which rows belong to which adapter."""
        ...

    def run(self, site: int, x: Tensor, y: Tensor) -> None:
        """Adds LoRA of site number `site` in place: x `[T, in_features]`, y `[T, width]`."""
        ...


class NoLora:
    """For models served without adapters."""

    def plan(self, batch: Batch) -> None:
        pass

    def run(self, site: int, x: Tensor, y: Tensor) -> None:
        pass


class Reference:
    """Plain torch, one matmul per adapter and slice: the CPU's strategy and what every other is tested against."""

    def __init__(self, sites: list[LoraSite], pool: DevicePool) -> None:
        self._widths = [site.out_features for site in sites]
        self._pool = pool
        self._segments: Segments | None = None

    def plan(self, batch: Batch) -> None:
        rows = batch.adapter_slots
        block_m = block_m_for(len(rows), len(set(rows.tolist())))
        plan = plan_segments(rows, self._pool.rank_start, self._pool.rank, block_m)
        self._segments = plan.to(self._pool.device) if plan.num_tokens else None

    def run(self, site: int, x: Tensor, y: Tensor) -> None:
        if self._segments is not None:
            self._apply(x, y, self._pool.a[site], self._pool.b[site], self._widths[site], self._segments)

    def _apply(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, widths: tuple[int, ...], segments: Segments) -> None:
        h = grouped_shrink_reference(x, a, segments)
        grouped_expand_reference(y, h, b, widths, segments)


class Grouped(Reference):
    """The Triton-lang kernels: one launch for all slices of a site, each adapter at its own rank."""

    def _apply(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, widths: tuple[int, ...], segments: Segments) -> None:
        h = grouped_shrink(x, a, segments, splits_for(segments, a.shape[0], a.shape[2]))
        grouped_expand(y, h, b, widths, segments)


STRATEGIES: dict[str, Callable[[list[LoraSite], DevicePool], LoraStrategy]] = {
    "reference": Reference,
    "grouped": Grouped,
}


def create_strategy(name: str, sites: list[LoraSite], pool: DevicePool | None, device: torch.device) -> LoraStrategy:
    """One of STRATEGIES by name; `auto` is grouped on CUDA and reference elsewhere. Without a pool LoRA is off."""
    if pool is None:
        return NoLora()
    if name == "auto":
        name = "grouped" if device.type == "cuda" else "reference"
    return STRATEGIES[name](sites, pool)
