# SPDX-License-Identifier: Apache-2.0
"""Adapters kept in host memory in device layout, so that coming back to the device needs no disk."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multilora_backend.adapters.layout import AdapterWeights


class HostCache:
    """Least recently used, by bytes, keyed by version: names with the same content share one copy."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._weights: OrderedDict[str, AdapterWeights] = OrderedDict()

    def get(self, version: str) -> AdapterWeights | None:
        weights = self._weights.get(version)
        if weights is not None:
            self._weights.move_to_end(version)
        return weights

    def put(self, weights: AdapterWeights) -> None:
        """Keeps the weights as the most recently used; what is larger than the whole budget is not kept."""
        if self.get(weights.version) is not None or weights.nbytes > self.budget_bytes:
            return
        while self.nbytes + weights.nbytes > self.budget_bytes:
            _, oldest = self._weights.popitem(last=False)
            self.nbytes -= oldest.nbytes
        self._weights[weights.version] = weights
        self.nbytes += weights.nbytes

    def __contains__(self, version: object) -> bool:
        return version in self._weights

    def __len__(self) -> int:
        return len(self._weights)
