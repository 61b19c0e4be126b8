# SPDX-License-Identifier: Apache-2.0
"""Which adapters and tenants have time series of their own: a bounded number, whatever clients send."""

from __future__ import annotations

OTHER = "__other__"
"""All that have no series of their own."""
BASE_MODEL = "__base__"
NO_TENANT = "__none__"


class LabelBudget:
    """First come, first served, and for good.

    A series that front ends share must not be ended by one of them: tritonserver counts references to it by front end,
    frees it with the first one's last, and writes to freed memory when another changes it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._given: set[str] = set()

    def label(self, value: str) -> str:
        """What to count `value` under: itself or OTHER."""
        if value not in self._given:
            if len(self._given) >= self._limit:
                return OTHER
            self._given.add(value)
        return value
