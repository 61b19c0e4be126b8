# SPDX-License-Identifier: Apache-2.0
"""Replaces a transformers model's linears by fused ones and tells where LoRA may act."""

from __future__ import annotations

from torch import nn

from multilora_backend.core import LoraSite
from multilora_backend.models.linear import Follow, FusedLinear, Lead

GROUPS = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}
"""Linears of one parent that read the same input, in the order in which transformers calls them."""


def fuse(model: nn.Module) -> list[LoraSite]:
    """Fuses in place every nn.Linear below the decoder's layers; returns the sites in module order.

    The output head stays as it is: it may be tied to the embedding.
    """
    sites: list[LoraSite] = []
    for name, parent in list(model.named_modules()):
        children = {n: m for n, m in parent.named_children() if type(m) is nn.Linear}
        if not children or ".layers." not in f"{name}.":
            continue
        for group, fused_name in _groups(list(children)):
            parts = [children[n] for n in group]
            site = LoraSite(
                key=f"{name}.{fused_name}",
                in_features=parts[0].in_features,
                modules=tuple(f"{name}.{n}" for n in group),
                out_features=tuple(p.out_features for p in parts),
            )
            fused = FusedLinear(site, len(sites), parts)
            sites.append(site)
            if len(group) == 1:
                setattr(parent, group[0], fused)
                continue
            lead = Lead(fused)
            setattr(parent, group[0], lead)
            for i, member in enumerate(group[1:], start=1):
                setattr(parent, member, Follow(lead, i))
    return sites


def _groups(names: list[str]) -> list[tuple[tuple[str, ...], str]]:
    """Splits the linears of one module into groups to fuse, each with the name of its fused linear."""
    groups: list[tuple[tuple[str, ...], str]] = []
    left = list(names)
    for members, fused_name in GROUPS.items():
        if set(members) <= set(left):
            groups.append((members, fused_name))
            left = [n for n in left if n not in members]
    return groups + [((n,), n) for n in left]
