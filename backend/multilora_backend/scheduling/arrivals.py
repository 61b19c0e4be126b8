# SPDX-License-Identifier: Apache-2.0
"""How often each adapter is asked for: an exponentially weighted rate, kept so that time changes no order.

Each arrival counts exp(t / TIME_CONSTANT_S) instead of decaying all that came before it (forward decay, Cormode et
al., ICDE 2009): scores of different adapters can be compared without touching them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

TIME_CONSTANT_S = 30.0
HOT = 64
"""Adapters that may be loaded before anybody asks."""
_LARGE = 1e200


@dataclass(eq=False)
class Arrivals:
    """Rates by adapter key. Cost of an arrival: O(HOT) if it changes who is hot, O(1) else."""

    since: float = 0.0
    """Time that scores refer to."""
    scores: dict[str, float] = field(default_factory=dict)
    hot: dict[str, None] = field(default_factory=dict)
    """Those with the largest scores."""

    def add(self, key: str, now: float) -> None:
        grown = math.exp(min(600.0, max(0.0, now - self.since) / TIME_CONSTANT_S))
        if grown > _LARGE:
            self._rebase(now, grown)
            grown = 1.0
        self.scores[key] = score = self.scores.get(key, 0.0) + grown
        if key in self.hot:
            return
        if len(self.hot) >= HOT:
            coldest = min(self.hot, key=self.scores.__getitem__)
            if self.scores[coldest] >= score:
                return
            del self.hot[coldest]
        self.hot[key] = None

    def rate(self, key: str, now: float) -> float:
        """Arrivals a second."""
        decayed = math.exp(-min(600.0, max(0.0, now - self.since) / TIME_CONSTANT_S))
        return self.scores.get(key, 0.0) * decayed / TIME_CONSTANT_S

    def score(self, key: str) -> float:
        """For comparing two adapters at the same time."""
        return self.scores.get(key, 0.0)

    def forget(self, key: str) -> None:
        self.scores.pop(key, None)
        self.hot.pop(key, None)

    def _rebase(self, now: float, grown: float) -> None:
        """Scores grow without bound; those that have become too small to count are forgotten."""
        self.since = now
        self.scores = {key: s / grown for key, s in self.scores.items() if s / grown > 1e-6}
        self.hot = {key: None for key in self.hot if key in self.scores}
