# SPDX-License-Identifier: Apache-2.0
"""Adapters kept in host memory in device layout, so that coming back to the device needs no disk."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multilora_backend.adapters.layout import AdapterWeights

WINDOW_SHARE, MAX_WINDOW = 4, 32
"""The oldest quarter, and at most so many, are alike in not having been used for long: cost decides between them."""
MAX_PASSES = 16
"""So often an adapter may be spared for its cost; then it goes by its age."""


@dataclass
class _Kept:
    weights: AdapterWeights
    seconds_per_byte: float
    """What it costs to get it again."""
    holds: int = 0
    passes: int = 0


class HostCache:
    """By bytes, keyed by version: names with the same content share one copy. What is held is never dropped.

    The budget bounds what is kept here. Weights that are being read, or are on their way to the device after they were
    dropped, come on top: a few adapters, by the number of loads under way.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.held_bytes = 0
        self._held: dict[str, _Kept] = {}
        self._idle: OrderedDict[str, _Kept] = OrderedDict()
        """The least recently used first."""

    def get(self, version: str) -> AdapterWeights | None:
        """Counts as a use."""
        kept = self._held.get(version) or self._idle.get(version)
        if kept is None:
            return None
        if not kept.holds:
            self._idle.move_to_end(version)
            kept.passes = 0
        return kept.weights

    def put(self, weights: AdapterWeights, reload_s: float = 0.0) -> bool:
        """Keeps the weights as the most recently used. False, and nothing is dropped, if what is held leaves no room.

        `reload_s`: how long it took, or would take, to get them again.
        """
        if self.get(weights.version) is not None:
            return True
        if weights.nbytes > self.budget_bytes - self.held_bytes:
            return False
        while self.nbytes + weights.nbytes > self.budget_bytes:
            self._forget(self._victim())
        self._idle[weights.version] = _Kept(weights, reload_s / max(weights.nbytes, 1))
        self.nbytes += weights.nbytes
        return True

    def hold(self, version: str) -> bool:
        """Forbids to drop it; each hold is ended by `drop`. False, and no hold, if it is not there."""
        kept = self._held.get(version)
        if kept is None:
            kept = self._idle.pop(version, None)
            if kept is None:
                return False
            self._held[version] = kept
            self.held_bytes += kept.weights.nbytes
        kept.holds += 1
        return True

    def drop(self, version: str) -> None:
        """Ends a hold; after the last one it is the most recently used. Raises KeyError if there is none."""
        kept = self._held[version]
        kept.holds -= 1
        if not kept.holds:
            self._idle[version] = self._held.pop(version)
            self.held_bytes -= kept.weights.nbytes

    def remove(self, version: str) -> bool:
        """Gives its bytes back now, if it is there and not held."""
        if version not in self._idle:
            return False
        self._forget(version)
        return True

    def __contains__(self, version: object) -> bool:
        return version in self._held or version in self._idle

    def __iter__(self) -> Iterator[str]:
        """Versions that are there, in no order."""
        return itertools.chain(self._held, self._idle)

    def __len__(self) -> int:
        return len(self._held) + len(self._idle)

    def _victim(self) -> str:
        window = min(max(len(self._idle) // WINDOW_SHARE, 1), MAX_WINDOW)
        oldest = list(itertools.islice(self._idle.items(), window))
        version = next((version for version, kept in oldest if kept.passes >= MAX_PASSES), None)
        if version is None:
            version = min(oldest, key=lambda item: item[1].seconds_per_byte)[0]
        for other, kept in oldest:
            if other == version:
                break
            kept.passes += 1
        return version

    def _forget(self, version: str) -> None:
        self.nbytes -= self._idle.pop(version).weights.nbytes
