# SPDX-License-Identifier: Apache-2.0
"""Paged attention behind one small interface: `plan` once a step on the host, `run` once a layer.

Registered with transformers under `NAME`, without a mask function, so that every layer calls it with
`attention_mask=None` and unrepeated K and V. A layer's KV tensor hangs on its attention module as `kv_cache`,
`[pages, 2, page_size, kv_heads, head_dim]`.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from multilora_backend.models import context
from multilora_backend.models.batch import Batch
from multilora_backend.scheduling.pages import TRASH_PAGE

NAME = "multilora_paged"
_IGNORED = {"dropout", "position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}


class AttentionBackend(Protocol):
    def plan(self, batch: Batch) -> None:
        """Prepares a step's metadata. Everything that depends on lengths and page tables happens here."""
        ...

    def run(
        self,
        kv_cache: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Writes K and V of the step's rows into their pages and attends causally over each row's sequence.

        query `[T, heads, head_dim]`, key and value `[T, kv_heads, head_dim]`, after rope; returns the
        query's shape. A row sees the last `window` positions, itself included (None: all).
        Scores are `softcap * tanh(scores / softcap)` if softcap is given (Gemma 2).
        """
        ...


class TorchAttention:
    """torch SDPA over gathered pages: exact and portable, the CPU's backend and the reference of all others."""

    def __init__(self, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._device = device

    def plan(self, batch: Batch) -> None:
        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(values, device=self._device)

        self._write = tensor(batch.write_pages), tensor(batch.write_offsets)
        counts = batch.row_starts[1:] - batch.row_starts[:-1]
        decoding = [i for i, count in enumerate(counts) if count == 1]
        self._chunks = [
            (int(batch.row_starts[i]), int(counts[i]), int(batch.context_lens[i]), tensor(batch.pages[i]))
            for i, count in enumerate(counts)
            if count > 1
        ]
        self._decode_rows = tensor(batch.row_starts[:-1][decoding])
        self._decode_lens = tensor(batch.context_lens[decoding])
        width = max((len(batch.pages[i]) for i in decoding), default=0)
        padded = [batch.pages[i] + [TRASH_PAGE] * (width - len(batch.pages[i])) for i in decoding]
        self._decode_pages = tensor(padded)

    def run(
        self,
        kv_cache: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        kv_cache[:, 0][self._write] = key
        kv_cache[:, 1][self._write] = value
        out = torch.empty_like(query)
        if len(self._decode_rows):
            keys, values = self._gather(kv_cache, self._decode_pages)
            at = torch.arange(keys.shape[1], device=query.device)
            seen = at < self._decode_lens[:, None]
            # Pages may hold another sequence's leftovers behind the end: zeros, since 0 * NaN is NaN.
            keys = keys.masked_fill(~seen[:, :, None, None], 0)
            values = values.masked_fill(~seen[:, :, None, None], 0)
            if window is not None:
                seen &= at >= self._decode_lens[:, None] - window
            rows = query[self._decode_rows][:, None]
            out[self._decode_rows] = _attend(rows, keys, values, seen[:, None, None], scale, softcap)[:, 0]
        for start, count, length, pages in self._chunks:
            keys, values = self._gather(kv_cache, pages[None])
            at = torch.arange(length, device=query.device)
            behind = torch.arange(length - count, length, device=query.device)[:, None] - at
            seen = behind >= 0
            if window is not None:
                seen &= behind < window
            rows = query[None, start : start + count]
            out[start : start + count] = _attend(rows, keys[:, :length], values[:, :length], seen, scale, softcap)[0]
        return out

    def _gather(self, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """pages `[B, P]` -> K and V, each `[B, P * page_size, kv_heads, head_dim]`."""
        both = kv_cache[pages]
        return both[:, :, 0].flatten(1, 2), both[:, :, 1].flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q `[B, Tq, heads, D]`, k and v `[B, Tk, kv_heads, D]`, seen broadcasts to `[B, heads, Tq, Tk]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
        out = scores.masked_fill(~seen, -torch.inf).float().softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call for a ragged batch: q `(1, heads, T, D)` -> `(1, T, heads, D)`."""
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _IGNORED)
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"attention argument {unknown or 'attention_mask'} would be ignored")
    out = context.current().attention.run(
        cast(Tensor, module.kv_cache),
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


AttentionInterface.register(NAME, paged_attention)
