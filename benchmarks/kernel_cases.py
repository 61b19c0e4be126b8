# SPDX-License-Identifier: Apache-2.0
"""The kernels at the linears of Llama-3.1-8B: what each is called with, and the bytes and operations it cannot save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multilora_kernels import (
    CopyTable,
    Delta,
    SegmentPlan,
    Segments,
    add_rmsnorm,
    add_rmsnorm_reference,
    copy_blocks,
    copy_blocks_reference,
    gated_activation,
    gated_activation_reference,
    grouped_expand,
    grouped_expand_reference,
    grouped_shrink,
    grouped_shrink_reference,
    padded_rank,
    plan_segments,
    rope_write,
    rope_write_reference,
)

PAGE_SIZE = 16
MAX_COPIES = 512


@dataclass(frozen=True)
class Size:
    """A model's widths; on the CPU a smaller model stands in, where only that the calls work can be seen."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @property
    def sites(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name of each fused linear -> its input width and the output width of each slice."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, (q, kv, kv)),
            "o": (q, (self.hidden,)),
            "gate_up": (self.hidden, (self.inner, self.inner)),
            "down": (self.inner, (self.hidden,)),
        }


LLAMA_8B = Size(4096, 14336, 32, 8, 128, 32)
SMALL = Size(256, 896, 4, 2, 64, 2)


@dataclass(frozen=True)
class Batch:
    tokens: int
    adapters: int
    """0: no LoRA."""
    rank: int

    def plan(self, block_m: int) -> SegmentPlan:
        """Tokens in random order, equally many of each adapter."""
        rows = np.random.default_rng(0).permutation(np.arange(self.tokens, dtype=np.int32) % self.adapters)
        starts = np.arange(self.adapters, dtype=np.int32) * padded_rank(self.rank)
        return plan_segments(rows, starts, np.full(self.adapters, self.rank, np.int32), block_m)

    def __str__(self) -> str:
        return f"{self.tokens}/{self.adapters}" if self.adapters else str(self.tokens)


@dataclass(frozen=True)
class Case:
    """One op at one shape, on `copies` sets of tensors, so that a set has left the caches when its turn comes again."""

    op: str
    site: str
    batch: Batch
    bytes: int
    """Every byte that has to move once: the active adapters' weights, activations, results."""
    flops: int
    copies: int
    kernel: Callable[[int, Segments | None], Any]
    """Runs on the copy of that number under these segments."""
    reference: Callable[[int, Segments | None], Any]


class Maker:
    """Makes cases. `cache_bytes` is what all copies of a case together must exceed."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype, cache_bytes: int) -> None:
        self.size, self.device, self.dtype, self.cache_bytes = size, device, dtype, cache_bytes

    def copies(self, bytes_of_one: int) -> int:
        return min(MAX_COPIES, max(2, -(-self.cache_bytes // bytes_of_one))) if self.cache_bytes else 1

    def new(self, copies: int, *shape: int) -> tuple[Tensor, ...]:
        return torch.randn(copies, *shape, device=self.device, dtype=self.dtype).unbind(0)

    def deltas(self, copies: int, batch: Batch, widths: tuple[int, ...]) -> Callable[[int, Segments], Delta | None]:
        """The delta of each copy under segments of any block_m."""
        if not batch.adapters:
            return lambda i, segments: None
        ranks = batch.adapters * padded_rank(batch.rank)
        hs = self.new(copies, batch.tokens, len(widths) * batch.plan(16).h_ranks)
        bs = self.new(copies, ranks, sum(widths))
        return lambda i, segments: Delta(hs[i], bs[i], segments)

    def delta_bytes(self, batch: Batch, widths: tuple[int, ...]) -> int:
        weights = batch.adapters * batch.rank * sum(widths)
        h = batch.tokens * batch.rank * len(widths) if batch.adapters else 0
        return (weights + h) * self.dtype.itemsize

    def delta_flops(self, batch: Batch, widths: tuple[int, ...]) -> int:
        return 2 * batch.tokens * batch.rank * sum(widths) if batch.adapters else 0

    def grouped_shrink(self, batch: Batch, site: str) -> Case:
        k, widths = self.size.sites[site]
        slices = len(widths)
        columns = slices * batch.rank
        bytes_moved = (batch.tokens * (k + columns) + batch.adapters * columns * k) * self.dtype.itemsize
        copies = self.copies(bytes_moved)
        xs = self.new(copies, batch.tokens, k)
        pools = self.new(copies, batch.adapters * padded_rank(batch.rank) * slices, k)
        return Case(
            "grouped_shrink", site, batch, bytes_moved, 2 * batch.tokens * columns * k, copies,
            lambda i, segments: grouped_shrink(xs[i], pools[i], slices, segments),
            lambda i, segments: grouped_shrink_reference(xs[i], pools[i], slices, segments),
        )  # fmt: skip

    def grouped_expand(self, batch: Batch, site: str) -> Case:
        widths = self.size.sites[site][1]
        bytes_moved = 2 * batch.tokens * sum(widths) * self.dtype.itemsize + self.delta_bytes(batch, widths)
        copies = self.copies(bytes_moved)
        ys, delta = self.new(copies, batch.tokens, sum(widths)), self.deltas(copies, batch, widths)
        return Case(
            "grouped_expand", site, batch, bytes_moved, self.delta_flops(batch, widths), copies,
            lambda i, segments: grouped_expand(ys[i], delta(i, segments), widths),
            lambda i, segments: grouped_expand_reference(ys[i], delta(i, segments), widths),
        )  # fmt: skip

    def add_rmsnorm(self, batch: Batch) -> Case:
        n = self.size.hidden
        bytes_moved = (4 * batch.tokens + 1) * n * self.dtype.itemsize
        copies = self.copies(bytes_moved)
        xs, residuals = self.new(copies, batch.tokens, n), self.new(copies, batch.tokens, n)
        (weight,) = self.new(1, n)
        return Case(
            "add_rmsnorm", "", batch, bytes_moved, 0, copies,
            lambda i, segments: add_rmsnorm(xs[i], residuals[i], weight, 1e-5),
            lambda i, segments: add_rmsnorm_reference(xs[i], residuals[i], weight, 1e-5),
        )  # fmt: skip

    def gated_activation(self, batch: Batch) -> Case:
        inner = self.size.inner
        widths = (inner, inner)
        bytes_moved = 3 * batch.tokens * inner * self.dtype.itemsize + self.delta_bytes(batch, widths)
        copies = self.copies(bytes_moved)
        gate_ups, delta = self.new(copies, batch.tokens, 2 * inner), self.deltas(copies, batch, widths)
        return Case(
            "gated_activation", "gate_up" if batch.adapters else "", batch,
            bytes_moved, self.delta_flops(batch, widths), copies,
            lambda i, segments: gated_activation(gate_ups[i], "silu", delta(i, segments)),
            lambda i, segments: gated_activation_reference(gate_ups[i], "silu", delta(i, segments)),
        )  # fmt: skip

    def rope_write(self, batch: Batch) -> Case:
        size, tokens = self.size, batch.tokens
        widths = size.sites["qkv"][1]
        bytes_moved = 2 * tokens * (sum(widths) + size.head_dim) * self.dtype.itemsize
        bytes_moved += self.delta_bytes(batch, widths)
        copies = self.copies(bytes_moved)
        qkvs, delta = self.new(copies, tokens, sum(widths)), self.deltas(copies, batch, widths)
        cos, sin = self.new(2, tokens, size.head_dim)
        pages = -(-tokens // PAGE_SIZE)
        caches = self.new(copies, pages, 2, PAGE_SIZE, size.kv_heads, size.head_dim)
        slots = torch.randperm(pages * PAGE_SIZE, device=self.device, dtype=torch.int32)[:tokens]

        def call(op: Callable[..., Tensor], i: int, segments: Segments) -> Tensor:
            heads = (size.heads, size.kv_heads)
            return op(qkvs[i], cos, sin, caches[i], slots, *heads, delta=delta(i, segments))

        return Case(
            "rope_write", "qkv" if batch.adapters else "", batch,
            bytes_moved, self.delta_flops(batch, widths), copies,
            lambda i, segments: call(rope_write, i, segments),
            lambda i, segments: call(rope_write_reference, i, segments),
        )  # fmt: skip

    def copy_blocks(self, batch: Batch) -> Case:
        """All adapters of the batch into the border, at every site of the model."""
        padded = padded_rank(batch.rank)
        ranks = batch.adapters * padded
        sites = list(self.size.sites.values()) * self.size.layers
        slices = [len(widths) for _, widths in sites]
        pools = [self.new(1, ranks * count, k)[0] for count, (k, _) in zip(slices, sites, strict=True)]
        table = CopyTable.of(pools, [torch.empty_like(pool) for pool in pools], slices)
        moves = torch.tensor([(i * padded, (batch.adapters - 1 - i) * padded, padded) for i in range(batch.adapters)])
        moves_host, moves = moves, moves.to(self.device, torch.int32)
        bytes_moved = 2 * sum(pool.numel() for pool in pools) * self.dtype.itemsize
        return Case(
            "copy_blocks", "", batch, bytes_moved, 0, 1,
            lambda i, segments: copy_blocks(table, moves),
            lambda i, segments: copy_blocks_reference(table, moves_host),
        )  # fmt: skip
