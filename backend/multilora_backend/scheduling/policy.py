# SPDX-License-Identifier: Apache-2.0
"""In which order waiting sequences are admitted. A policy is a pure function of a snapshot.

It only ranks: what fits (pages, tokens, adapter slots) is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from multilora_backend.core import Sequence


@dataclass(frozen=True)
class Snapshot:
    """What a policy may look at."""

    now: float
    """Seconds, on the clock of `Sequence.arrival`."""
    resident: Collection[str]
    """Names of the adapters that are ACTIVE."""


class Policy(Protocol):
    def order(self, waiting: Iterable[Sequence], snapshot: Snapshot) -> list[Sequence]:
        """The waiting sequences, the next to admit first."""
        ...

    def overdue(self, sequence: Sequence, snapshot: Snapshot) -> bool:
        """True if no sequence of another adapter may take a slot before this one any more."""
        ...


@dataclass(frozen=True)
class FirstCome:
    """Larger priority first, then first come, first served; nobody is ever overtaken within a priority."""

    def order(self, waiting: Iterable[Sequence], snapshot: Snapshot) -> list[Sequence]:
        return sorted(waiting, key=lambda s: (-s.priority, s.arrival))

    def overdue(self, sequence: Sequence, snapshot: Snapshot) -> bool:
        return True


@dataclass(frozen=True)
class AdapterFirst:
    """Within a priority, sequences that need no load go first, until one has waited `max_overtake_s`."""

    max_overtake_s: float

    def order(self, waiting: Iterable[Sequence], snapshot: Snapshot) -> list[Sequence]:
        def key(s: Sequence) -> tuple[int, bool, bool, float]:
            loaded = not s.adapter or s.adapter in snapshot.resident
            return -s.priority, not self.overdue(s, snapshot), not loaded, s.arrival

        return sorted(waiting, key=key)

    def overdue(self, sequence: Sequence, snapshot: Snapshot) -> bool:
        return snapshot.now - sequence.arrival >= self.max_overtake_s
