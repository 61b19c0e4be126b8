# SPDX-License-Identifier: Apache-2.0
"""What the engine's thread asks of loader threads, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import IntEnum

from multilora_backend.adapters.layout import AdapterWeights
from multilora_backend.adapters.peft import AdapterPlan
from multilora_backend.adapters.sources import Source
from multilora_backend.adapters.state import Fingerprint


class Purpose(IntEnum):
    """What a job is for, the most urgent first: it overtakes what has not begun."""

    STOP = 0
    DEVICE = 1
    """Somebody waits for the weights."""
    HOST = 2
    """The weights will be wanted."""
    CHECK = 3
    """Config and header only."""
    LOOK = 4
    """Only whether a refused source has changed since."""


Parts = tuple[tuple["Job", Decimal], ...]


@dataclass(frozen=True, eq=False)
class Job:
    key: str
    """Of the revision, for logs: whose job it is, is told by the job itself."""
    source: Source
    purpose: Purpose
    known: Fingerprint | None = None
    """Of the source's folder when it was last read or refused."""
    cached: AdapterWeights | None = None
    """What the source held when its fingerprint was `known`."""
    frozen: bool = False
    """`cached` is what is wanted, whatever the source holds by now."""
    parts: Parts = ()
    """Of a composition: how to get the weights of each part, and its factor. `cached` then has all of it together."""

    @property
    def weights(self) -> bool:
        return self.purpose in (Purpose.DEVICE, Purpose.HOST)

    @property
    def is_local(self) -> bool:
        """Nothing has to be downloaded for it."""
        if self.parts:
            return all(part.source.is_local or part.cached is not None for part, _ in self.parts)
        return self.source.is_local


@dataclass(frozen=True)
class Outcome:
    """At most one of `weights`, `plan` and `reason` is set: loaded, checked, or failed; none for a look."""

    job: Job
    fingerprint: Fingerprint | None
    """Taken before reading; None if reading failed for a cause outside of the folder's content."""
    weights: AdapterWeights | None = None
    plan: AdapterPlan | None = None
    reason: str = ""
    seconds: float = 0.0
    """How long reading took; 0 if nothing was read."""
    parts: tuple[Outcome, ...] = ()
    """Of a composition, in the order of the job's parts."""
