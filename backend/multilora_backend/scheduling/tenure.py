# SPDX-License-Identifier: Apache-2.0
"""Time-slicing: which adapter gives up its slot to one that is overdue, and whether any has to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

PATIENCE = 4
"""After so many tenures an adapter goes in any case: it is what bounds everybody's wait."""
SECOND = 2
"""So many tenures has an adapter some of whose requests wait since before its turn: seats were short, not its slot."""
WEIGHTS = 4.0
"""A class's adapters keep their slots longer by its weight, but at most this factor longer than another's."""
FLOWS = 1.0
"""Slots that became free by themselves within two tenures, over all slots."""


@dataclass(frozen=True)
class Candidate:
    """A line that is overdue and has no slot."""

    due: float
    weight: float
    """Of its class."""
    share: float
    """Slots of its tenant over the tenant's weight, the one that it asks for included."""


class Holder(msgspec.Struct, frozen=True):
    """An adapter with a slot. A Struct, as many are built in a step."""

    adapter: str
    held_s: float
    due: float
    """The smallest of its waiting lines; infinite if all of its sequences run."""
    behind: bool
    """Something that has never run waits since before this turn."""
    work: int
    """Its sequences, running and waiting: what the batch loses if it goes."""
    weight: float
    """Of the class that took the slot."""
    share: float
    """Slots of the tenant that took it over the tenant's weight."""


def scaled(tenure_s: float, weight: float, wanted_by: float) -> float:
    """How long an adapter of a class of `weight` may keep its slot when one of a class of `wanted_by` is overdue."""
    return tenure_s * max(1 / WEIGHTS, min(WEIGHTS, weight / wanted_by))


def victim(holders: Iterable[Holder], candidate: Candidate, tenure_s: float, seats: bool) -> str | None:
    """The adapter to be turned out, or None if all may stay for now.

    Its tenure is over, and it either belongs to a tenant that has more than the candidate's would, or has nothing that
    waits as long as the candidate, or has stayed for PATIENCE tenures. Of several, the one that would miss it least, or
    with `seats`, when the batch is not full, so that slots are what it lacks, the one that the batch would miss least.
    """
    least: tuple[float, ...] | None = None
    chosen: str | None = None
    for holder in holders:
        tenure = scaled(tenure_s, holder.weight, candidate.weight)
        if holder.held_s < tenure * (SECOND if holder.behind else 1):
            continue
        richer, younger = holder.share > candidate.share, holder.due > candidate.due
        if richer or younger or holder.held_s >= PATIENCE * tenure:
            key = (-holder.share, holder.work if seats else 0, -holder.due, -holder.held_s)
            if least is None or key < least:
                least, chosen = key, holder.adapter
    return chosen


@dataclass
class Flow:
    """How often slots become free by themselves, with exponential weights."""

    span_s: float
    freed: float = 0.0
    """In the last `span_s`, as of `at`."""
    at: float = 0.0

    def count(self, now: float) -> None:
        self.freed, self.at = 1 + self.recent(now), now

    def recent(self, now: float) -> float:
        return self.freed * math.exp(min(0.0, self.at - now) / self.span_s)

    def suffices(self, slots: int, now: float) -> bool:
        """True if slots change hands about as often as tenure would see to it.

        Then to turn somebody out helps nobody: the adapter would have to be loaded again for what it left undone.
        """
        return self.recent(now) >= FLOWS * slots
