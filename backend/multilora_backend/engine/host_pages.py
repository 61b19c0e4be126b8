# SPDX-License-Identifier: Apache-2.0
"""Copies KV pages to host memory and back, in the order of the steps and without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multilora_backend.core import PageMove

CHUNK = 32
"""Pages that are gathered on the device at a time: 64 MiB of an 8B model's."""


class HostPageStore:
    """One row of host memory a page, all layers behind each other, pinned where there is a CUDA device.

    Every copy is queued on the stream that steps run on. So a page is read after the step that fills it and before the
    one that overwrites it, and the host never waits.
    """

    def __init__(self, caches: Sequence[Tensor], num_pages: int) -> None:
        """`caches`: `[pages, 2, page_size, kv_heads, head_dim]` of each layer."""
        first = caches[0]
        self._caches = caches
        self._pinned = first.device.type == "cuda"
        row = sum(cache[0].numel() for cache in caches)
        self._rows = torch.empty((num_pages, row), dtype=first.dtype, pin_memory=self._pinned)
        self._staging = torch.empty((min(CHUNK, num_pages), row), dtype=first.dtype, device=first.device)

    @torch.inference_mode()
    def move(self, moves: Sequence[PageMove]) -> None:
        for move in moves:
            for begin in range(0, len(move.pages), CHUNK):
                pages, places = move.pages[begin : begin + CHUNK], move.places[begin : begin + CHUNK]
                index = torch.tensor(pages, dtype=torch.int64, pin_memory=self._pinned)
                index = index.to(self._staging.device, non_blocking=True)
                if move.to_host:
                    self._save(index, places)
                else:
                    self._restore(index, places)

    def _save(self, index: Tensor, places: Sequence[int]) -> None:
        at = 0
        for cache in self._caches:
            size = cache[0].numel()
            self._staging[: len(index), at : at + size] = cache.index_select(0, index).flatten(1)
            at += size
        for row, place in enumerate(places):
            self._rows[place].copy_(self._staging[row], non_blocking=True)

    def _restore(self, index: Tensor, places: Sequence[int]) -> None:
        for row, place in enumerate(places):
            self._staging[row].copy_(self._rows[place], non_blocking=True)
        at = 0
        for cache in self._caches:
            size = cache[0].numel()
            pages = self._staging[: len(index), at : at + size].view(len(index), *cache.shape[1:])
            cache.index_copy_(0, index, pages)
            at += size
