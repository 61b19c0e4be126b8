# SPDX-License-Identifier: Apache-2.0
"""Paged attention behind one small interface: `plan` once a step on the host, `run` once a layer.

K and V of the step's rows are in their pages before `run`: `rope_write` puts them there. A layer's KV tensor is
`[pages, 2, page_size, kv_heads, head_dim]`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from multilora_backend.models.batch import Batch
from multilora_backend.models.layers import AttentionSpec
from multilora_backend.scheduling.pages import TRASH_PAGE

NAME = "multilora_paged"


def _not_called(*_: Any, **__: Any) -> None:
    raise RuntimeError("transformers' attention ran, but ours takes its place")


# A registered name without a mask function keeps transformers from making masks, which is all that it is for.
AttentionInterface.register(NAME, _not_called)


class AttentionBackend(Protocol):
    def plan(self, batch: Batch) -> None:
        """Prepares a step's metadata. Everything that depends on lengths and page tables happens here."""
        ...

    def run(self, kv_cache: Tensor, query: Tensor, spec: AttentionSpec, out: Tensor | None = None) -> Tensor:
        """Attends causally over each row's sequence: query `[T, heads, head_dim]` after rope, result the same shape.

        The result is `out` if that is given.
        """
        ...


class TorchAttention:
    """torch SDPA over gathered pages: exact and portable, the CPU's backend and the reference of all others."""

    def __init__(self, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._device = device

    def plan(self, batch: Batch) -> None:
        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(values, device=self._device, dtype=torch.long)

        counts = batch.row_starts[1:] - batch.row_starts[:-1]
        pages = [batch.pages[a:b].tolist() for a, b in zip(batch.page_starts, batch.page_starts[1:], strict=False)]
        decoding = [i for i, count in enumerate(counts) if count == 1]
        self._chunks = [
            (int(batch.row_starts[i]), int(counts[i]), int(batch.context_lens[i]), tensor(pages[i]))
            for i, count in enumerate(counts)
            if count > 1
        ]
        self._decode_rows = tensor(batch.row_starts[:-1][decoding])
        self._decode_lens = tensor(batch.context_lens[decoding])
        width = max((len(pages[i]) for i in decoding), default=0)
        self._decode_pages = tensor([pages[i] + [TRASH_PAGE] * (width - len(pages[i])) for i in decoding])

    def run(self, kv_cache: Tensor, query: Tensor, spec: AttentionSpec, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(query) if out is None else out
        if len(self._decode_rows):
            keys, values = self._gather(kv_cache, self._decode_pages)
            at = torch.arange(keys.shape[1], device=query.device)
            seen = at < self._decode_lens[:, None]
            # Pages may hold another sequence's leftovers behind the end: zeros, since 0 * NaN is NaN.
            keys = keys.masked_fill(~seen[:, :, None, None], 0)
            values = values.masked_fill(~seen[:, :, None, None], 0)
            if spec.window is not None:
                seen &= at >= self._decode_lens[:, None] - spec.window
            rows = query[self._decode_rows][:, None]
            out[self._decode_rows] = _attend(rows, keys, values, seen[:, None, None], spec)[:, 0]
        for start, count, length, pages in self._chunks:
            keys, values = self._gather(kv_cache, pages[None])
            at = torch.arange(length, device=query.device)
            behind = torch.arange(length - count, length, device=query.device)[:, None] - at
            seen = behind >= 0
            if spec.window is not None:
                seen &= behind < spec.window
            rows = query[None, start : start + count]
            out[start : start + count] = _attend(rows, keys[:, :length], values[:, :length], seen, spec)[0]
        return out

    def _gather(self, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """pages `[B, P]` -> K and V, each `[B, P * page_size, kv_heads, head_dim]`."""
        both = kv_cache[pages]
        return both[:, :, 0].flatten(1, 2), both[:, :, 1].flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, spec: AttentionSpec) -> Tensor:
    """q `[B, Tq, heads, D]`, k and v `[B, Tk, kv_heads, D]`, seen broadcasts to `[B, heads, Tq, Tk]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if spec.softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=spec.scale, enable_gqa=True)
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.tanh(q @ k.transpose(-1, -2) * (spec.scale / spec.softcap)) * spec.softcap
        out = scores.masked_fill(~seen, -torch.inf).float().softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2)
