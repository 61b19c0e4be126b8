# SPDX-License-Identifier: Apache-2.0
"""An adapter's weights on the host as the device pool has them, in few large buffers that go to the device whole."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multilora_backend.adapters.ranks import padded
from multilora_backend.added_tokens import NO_TOKENS, AddedTokens
from multilora_backend.core import LoraSite

if TYPE_CHECKING:
    from multilora_backend.adapters.extras import Extras

BUFFER_BYTES = 16 * 2**20
"""Host memory comes in pieces of this size, and each is one copy to the device.

torch's pinned allocator rounds every allocation up to a power of two and keeps what is freed for the next one of that
size. In one piece, 84 MB of rank 16 at Llama-3.1-8B would take 134 MB and fit no adapter of another rank afterwards;
in pieces of a power of two hardly anything is rounded and every piece fits every adapter. A piece is also the longest
that a step's own small copies can wait for the copy engine: 0.3 ms at 55 GB/s.
"""


VERSION_DIGITS = 32
"""Of a content hash in hexadecimal: 128 bits."""


@dataclass(frozen=True, eq=False)
class SiteWeights:
    """The rows of one adapter in one site, zero beyond a module's own rank and where a slice has no LoRA."""

    a: Tensor
    """[slices * padded(rank), in_features], slice-major; with experts as many of those, expert after expert."""
    b: Tensor
    """[padded(rank), width], multiplied by the scale; with experts as `a`."""


@dataclass(frozen=True, eq=False)
class Buffer:
    data: Tensor
    """[elements]: a and b of consecutive sites, one after the other."""
    sizes: tuple[int, ...]
    """Elements of each of them."""
    nbytes: int
    """As allocated."""


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """In the device pool's layout on the host, in pinned memory if that was asked for."""

    version: str
    """Content hash of the folder's config and weights, and of tokens of its own."""
    rank: int
    sites: tuple[SiteWeights | None, ...]
    """One for each site of the model; None where the adapter does nothing."""
    buffers: tuple[Buffer, ...]
    """What the sites' tensors are views of: a, then b of each site that is not None."""
    no_effect: bool
    """Every product BA is zero, and no extra changes anything."""
    extras: Extras | None = None
    """What it has besides A and B; None for most adapters."""
    invocation: tuple[int, ...] = ()
    """Tokens from which on it acts; empty: everywhere. See `adapters.activation`."""
    tokens: AddedTokens = NO_TOKENS
    """That its tokenizer has and the base model's has not."""

    @property
    def nbytes(self) -> int:
        extras = 0 if self.extras is None else self.extras.buffer.nbytes
        return sum(buffer.nbytes for buffer in self.buffers) + extras

    @property
    def extras_bytes(self) -> int:
        """On the device."""
        return 0 if self.extras is None else self.extras.size


def rank_numel(site: LoraSite) -> int:
    """Elements of one rank in one site."""
    return sum(rows * columns for rows, columns in site.rank_shapes)


def numel(site: LoraSite, rank: int) -> int:
    """Elements that an adapter takes in one site."""
    return padded(rank) * rank_numel(site)


def host_bytes(sites: Sequence[LoraSite], touched: Collection[int], rank: int, dtype: torch.dtype, pin: bool) -> int:
    """What `allocate` would allocate."""
    sizes = [size for _, _, size in _shapes(sites, touched, rank)]
    return sum(allocated(sum(group) * dtype.itemsize, pin) for group in _group(sizes, BUFFER_BYTES // dtype.itemsize))


def allocate(
    sites: Sequence[LoraSite], touched: Collection[int], rank: int, dtype: torch.dtype, pin: bool = False
) -> tuple[tuple[Buffer, ...], tuple[SiteWeights | None, ...]]:
    """Memory, not initialised, for an adapter with LoRA on the sites whose indices are in `touched`."""
    shapes = _shapes(sites, touched, rank)
    sizes = [size for _, _, size in shapes]
    buffers = tuple(allocate_buffer(group, dtype, pin) for group in _group(sizes, BUFFER_BYTES // dtype.itemsize))
    parts = (part for buffer in buffers for part in buffer.data.split(buffer.sizes))
    views = iter([part.view(height, width) for part, (height, width, _) in zip(parts, shapes, strict=True)])
    return buffers, tuple(SiteWeights(next(views), next(views)) if i in touched else None for i in range(len(sites)))


def reserve(nbytes: int) -> None:
    """Takes pinned memory from the system and leaves it to torch's allocator, which keeps it for `allocate`.

    Pinning 16 MiB holds up every launch for 10 ms (one H200): it is not to be done while steps run.
    """
    # All at once, and dropped together: one after the other would be the same memory again.
    _ = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(-(-nbytes // BUFFER_BYTES))]


def _shapes(sites: Sequence[LoraSite], touched: Collection[int], rank: int) -> list[tuple[int, int, int]]:
    """(height, width, elements) of a, then of b, of each touched site."""
    shapes = [shape for index, site in enumerate(sites) if index in touched for shape in site.rank_shapes]
    ranks = padded(rank)
    return [(ranks * rows, columns, ranks * rows * columns) for rows, columns in shapes]


def _group(sizes: list[int], limit: int) -> list[list[int]]:
    """Cuts into runs of at most `limit` together; what is larger is a run of its own."""
    groups: list[list[int]] = []
    total = limit
    for size in sizes:
        if total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(size)
        total += size
    return groups


def allocate_buffer(sizes: list[int], dtype: torch.dtype, pin: bool) -> Buffer:
    """One piece of memory for tensors of so many elements."""
    data = torch.empty(sum(sizes), dtype=dtype, pin_memory=pin)
    return Buffer(data, tuple(sizes), allocated(data.nbytes, pin))


def allocated(nbytes: int, pin: bool) -> int:
    """torch's pinned allocator rounds up to a power of two."""
    return 1 << (nbytes - 1).bit_length() if pin else nbytes
