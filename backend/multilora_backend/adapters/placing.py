# SPDX-License-Identifier: Apache-2.0
"""Where a target's A and B lie in its site's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from multilora_backend.core import LoraSite

if TYPE_CHECKING:
    from multilora_backend.adapters.layout import SiteWeights
    from multilora_backend.adapters.peft import Part


def place(weights: SiteWeights, part: Part, site: LoraSite, own_a: Tensor, own_b: Tensor) -> tuple[Tensor, Tensor]:
    """Writes a part's A and scaled B; returns the views of `weights` that were written."""
    scaled = own_b.float() * part.scale
    if site.experts and part.expert is None:
        # PEFT has the experts of a rank side by side in B.
        a = weights.a.view(site.experts, -1, site.in_features)[:, : part.rank]
        b = weights.b.view(site.experts, -1, site.width)[:, : part.rank]
        a.copy_(own_a.view(a.shape))
        b.copy_(scaled.view(site.width, part.rank, site.experts).permute(2, 1, 0))
        return a, b
    if part.expert is not None:
        # Two linears that are one parameter by now: each has ranks of its own, and B is zero but on the diagonal.
        row = part.expert * (len(weights.b) // site.experts) + part.first
        rows = slice(row, row + part.rank)
        first, width = part.slice * len(own_b), len(own_b)
        a, b = weights.a[rows], weights.b[rows, first : first + width]
    else:
        row, first = part.slice * len(weights.b), sum(site.out_features[: part.slice])
        a = weights.a[row : row + part.rank]
        b = weights.b[: part.rank, first : first + site.out_features[part.slice]]
    a.copy_(own_a)
    b.copy_(scaled.T)
    return a, b
