# SPDX-License-Identifier: Apache-2.0
"""Where a target's A and B lie in its site's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from multilora_backend.core import LoraSite

if TYPE_CHECKING:
    from multilora_backend.adapters.layout import SiteWeights
    from multilora_backend.adapters.peft_plan import Part


class Copy(NamedTuple):
    """Views of the same shape: of the site's rows and of the file's tensor."""

    target: Tensor
    source: Tensor


def place(weights: SiteWeights, part: Part, site: LoraSite, own_a: Tensor, own_b: Tensor) -> tuple[Copy, Copy]:
    """What of a part's A and B goes where."""
    if site.experts and part.expert is None:
        # PEFT has the experts of a rank side by side in B.
        a = weights.a.view(site.experts, -1, site.in_features)[:, : part.rank]
        b = weights.b.view(site.experts, -1, site.width)[:, : part.rank]
        return Copy(a, own_a.view(a.shape)), Copy(b, own_b.view(site.width, part.rank, site.experts).permute(2, 1, 0))
    if part.expert is not None:
        # Two linears that are one parameter by now: each has ranks of its own, and B is zero but on the diagonal.
        row = part.expert * (len(weights.b) // site.experts) + part.first
        rows = slice(row, row + part.rank)
        first, width = part.slice * len(own_b), len(own_b)
        return Copy(weights.a[rows], own_a), Copy(weights.b[rows, first : first + width].T, own_b)
    row, first = part.slice * len(weights.b), sum(site.out_features[: part.slice])
    a = weights.a[row : row + part.rank]
    b = weights.b[: part.rank, first : first + site.out_features[part.slice]]
    return Copy(a, own_a), Copy(b.T, own_b)
