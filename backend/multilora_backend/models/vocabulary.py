# SPDX-License-Identifier: Apache-2.0
"""The embedding and the head of the running model, with what adapters do to them: row by row, in plain torch.

Few rows pass here in a step that decodes, and steps without such adapters compute what transformers computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multilora_backend.models import context
from multilora_backend.models.extras import Table


class Embedding(nn.Module):
    """Around transformers' own, whose weight may be the head's as well."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids int [1, T] -> [1, T, hidden]."""
        tables = context.current().lora.extras.embedding()
        if tables is None:
            return self.base(ids)
        # An adapter may know tokens that the base model does not.
        x = self.base(ids.clamp_max(self.base.num_embeddings - 1))
        for rows, table in tables:
            x[0, rows] = self._of(ids[0, rows], x[0, rows], table)
        return x

    def _of(self, ids: Tensor, x: Tensor, table: Table) -> Tensor:
        """ids [n] of one adapter's rows; x [n, hidden] is what the base model makes of them."""
        if table.weight is not None:
            # Never outside, whatever was asked for: on CUDA that would end the engine.
            ids = ids.clamp_max(len(table.weight) - 1)
            x = self._scaled(F.embedding(ids, table.weight))
        if table.tokens is not None and table.rows is not None:
            found = ids[:, None] == table.tokens
            x = torch.where(found.any(1, keepdim=True), self._scaled(table.rows[found.long().argmax(1)]), x)
        if table.a is not None and table.b is not None:
            x = x + self._scaled(F.embedding(ids, table.a) @ table.b)
        return _affine(x, table)

    def _scaled(self, x: Tensor) -> Tensor:
        """Gemma's embeddings are multiplied by the square root of their width."""
        scale = getattr(self.base, "embed_scale", None)
        return x if scale is None else x * scale.to(x.dtype)


class Head(nn.Module):
    """Around transformers' own. Columns of tokens that a row's adapter does not know are `StepExtras.bound`'s."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [1, B, hidden] -> [1, B, vocabulary], as wide as the largest of the step's adapters' vocabularies."""
        step = context.current()
        tables = step.lora.extras.head()
        if tables is None:
            return self.base(x) if step.logits is None else self._into(step.logits, x)
        logits = self.base(x)
        widths = [len(table.weight) for _, table in tables if table.weight is not None]
        more = max([0, *(width - logits.shape[-1] for width in widths)])
        logits = F.pad(logits, (0, more)) if more else logits
        for rows, table in tables:
            own = self._of(x[0, rows], logits[0, rows], table)
            logits[0, rows, : own.shape[1]] = own
        return logits

    def _into(self, out: Tensor, x: Tensor) -> Tensor:
        """The base head's result, the same product bit for bit, in `out` [B, vocabulary]; returns [1, B, vocabulary].

        Raises:
            ValueError: `out` has another shape. torch would give it a new one, and its memory would stay as it was.
        """
        weight, bias = self.base.weight, self.base.bias
        if out.shape != (x.shape[1], len(weight)):
            raise ValueError(f"logits must be {[x.shape[1], len(weight)]}, got {list(out.shape)}")
        if bias is None:
            torch.mm(x[0], weight.t(), out=out)
        else:
            torch.addmm(bias, x[0], weight.t(), out=out)
        return out[None]

    def _of(self, x: Tensor, logits: Tensor, table: Table) -> Tensor:
        """x [n, hidden] of one adapter's rows; logits [n, vocabulary or more] are the base model's."""
        logits = logits[:, : len(self.base.weight)] if table.weight is None else F.linear(x, table.weight)
        if table.tokens is not None and table.rows is not None:
            logits[:, table.tokens] = F.linear(x, table.rows)
        if table.a is not None and table.b is not None:
            logits = logits + F.linear(F.linear(x, table.a), table.b)
        return _affine(logits, table)


def _affine(y: Tensor, table: Table) -> Tensor:
    if table.affine is None:
        return y
    gain, shift = table.affine
    return (y.float() * gain + shift).to(y.dtype)
