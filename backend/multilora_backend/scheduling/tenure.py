# SPDX-License-Identifier: Apache-2.0
"""Time-slicing, as a pure function: which adapter gives up its slot to one that is overdue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PATIENCE = 4
"""After so many tenures an adapter goes in any case: it is what bounds everybody's wait."""
SECOND = 2
"""So many tenures has an adapter some of whose requests wait since before its turn: seats were short, not its slot."""
WEIGHTS = 4.0
"""A class's adapters keep their slots longer by its weight, but at most this factor longer than another's."""


@dataclass(frozen=True)
class Candidate:
    """A line that is overdue and has no slot."""

    due: float
    weight: float
    """Of its class."""
    share: float
    """Slots of its tenant over the tenant's weight, the one that it asks for included."""


@dataclass(frozen=True)
class Holder:
    """An adapter with a slot."""

    adapter: str
    held_s: float
    due: float
    """The smallest of its waiting lines; infinite if all of its sequences run."""
    behind: bool
    """Something that has never run waits since before this turn."""
    weight: float
    """Of the class that took the slot."""
    share: float
    """Slots of the tenant that took it over the tenant's weight."""


def victim(holders: Iterable[Holder], candidate: Candidate, tenure_s: float) -> str | None:
    """The adapter to be turned out, or None if all may stay for now.

    Its tenure is over, and it either belongs to a tenant that has more than the candidate's would, or has nothing that
    waits as long as the candidate, or has stayed for PATIENCE tenures. Of several, the one that would miss it least.
    """
    least: tuple[float, float, float] | None = None
    chosen: str | None = None
    for holder in holders:
        tenure = tenure_s * max(1 / WEIGHTS, min(WEIGHTS, holder.weight / candidate.weight))
        if holder.held_s < tenure * (SECOND if holder.behind else 1):
            continue
        richer, younger = holder.share > candidate.share, holder.due > candidate.due
        if richer or younger or holder.held_s >= PATIENCE * tenure:
            key = (-holder.share, -holder.due, -holder.held_s)
            if least is None or key < least:
                least, chosen = key, holder.adapter
    return chosen
