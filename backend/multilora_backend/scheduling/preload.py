# SPDX-License-Identifier: Apache-2.0
"""Loading before anybody asks: which adapter is worth bringing nearer, as a pure function of a snapshot.

What is asked for already is loaded ahead of its turn by `scheduling.turns`; this is about requests that have not come.
An adapter goes to the device if one is likely within DEVICE_HORIZON_S, to the host within HOST_HORIZON_S.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import MultiloraError
from multilora_backend.scheduling.arrivals import Arrivals

if TYPE_CHECKING:
    from multilora_backend.scheduling.interface import Adapters

EVERY_S = 0.05
"""So often one of the hot adapters is looked at."""
DEVICE_HORIZON_S = 10.0
HOST_HORIZON_S = 60.0
SOON_S = 0.02
"""What loads faster than that is in the host."""
LIKELY = 1.0
"""Arrivals expected within the horizon."""


@dataclass(frozen=True)
class Prospect:
    """An adapter that nobody waits for now."""

    key: str
    rate: float
    """Arrivals a second that are expected."""
    load_cost_s: float
    """0 if it is on the device already, infinite if it cannot be loaded."""


@dataclass(frozen=True)
class Preload:
    """What to do about a prospect."""

    to_device: bool
    protect: frozenset[str] = frozenset()
    """Not to be evicted for it: what is about to run, and what is likelier to be asked for."""


def plan_preload(
    prospect: Prospect, resident: Collection[str], waiting: Collection[str], scores: Mapping[str, float]
) -> Preload | None:
    """None: leave it where it is."""
    if not 0 < prospect.load_cost_s < math.inf:
        return None
    if prospect.rate * DEVICE_HORIZON_S >= LIKELY:
        own = scores.get(prospect.key, 0.0)
        return Preload(True, frozenset(k for k in resident if k in waiting or scores.get(k, 0.0) >= own))
    if prospect.rate * HOST_HORIZON_S >= LIKELY and prospect.load_cost_s > SOON_S:
        return Preload(False)
    return None


class Preloader:
    """Counts arrivals, and looks at one of the adapters that are asked for most often at a time."""

    def __init__(self, adapters: Adapters, enabled: bool) -> None:
        self.arrivals = Arrivals()
        self._adapters = adapters
        self._enabled = enabled
        self._look_at = 0.0

    def look(self, now: float, waiting: Collection[str]) -> None:
        """`waiting` are adapters that somebody waits for."""
        hot = self.arrivals.hot
        if not self._enabled or now < self._look_at or not hot:
            return
        self._look_at = now + EVERY_S
        key = next(iter(hot))
        hot[key] = hot.pop(key)  # to the end: each has its turn
        try:
            prospect = Prospect(key, self.arrivals.rate(key, now), self._adapters.load_cost_s(key))
            plan = plan_preload(prospect, self._adapters.resident(), waiting, self.arrivals.scores)
            if plan is None:
                return
            if not plan.to_device or self._adapters.request(key, plan.protect) is AdapterState.COLD:
                self._adapters.prefetch(key)
        except MultiloraError:  # it was removed meanwhile
            self.arrivals.forget(key)
