# SPDX-License-Identifier: Apache-2.0
"""Which adapters stay on the device once they are there, and what that leaves for the others."""

from __future__ import annotations

from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.room import GRAIN_BYTES, grains
from multilora_backend.adapters.state import AdapterRecord
from multilora_backend.errors import ErrorCode, MultiloraError


class Pins:
    """Pool and arena can be moved together, so pins fit if they add up. An unknown rank counts when it is known."""

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool
        self._records: dict[str, AdapterRecord] = {}

    def check(self, record: AdapterRecord) -> None:
        """Raises MultiloraError if it does not fit beside what is pinned."""
        problem = self.excess(record)
        if problem:
            raise MultiloraError(ErrorCode.UNAVAILABLE, problem)

    def add(self, record: AdapterRecord) -> None:
        record.pinned = True
        self._records[record.key] = record

    def remove(self, record: AdapterRecord) -> None:
        record.pinned = False
        self._records.pop(record.key, None)

    def excess(self, record: AdapterRecord) -> str:
        """Why it cannot be pinned; empty if it can."""
        if not record.rank:
            return ""
        for field, need, budget, taken in self._claims(record):
            if need > budget - taken:
                return (
                    f"{record.entry.name} cannot be pinned: it needs {need} bytes, and of the {budget} of {field} "
                    f"{taken} are pinned"
                )
        return ""

    def in_the_way(self, record: AdapterRecord) -> str:
        """Why an adapter of known rank cannot be loaded as long as all of them stay; empty if it can."""
        if not self._records:
            return ""
        for field, need, budget, taken in self._claims(record):
            if need > budget - taken:
                return (
                    f"it needs {need} bytes on the device, and pinned adapters leave {budget - taken} of {field}; "
                    "unpin some"
                )
        return ""

    def _claims(self, record: AdapterRecord) -> list[tuple[str, int, int, int]]:
        """For each of the two budgets its name, what the record needs of it, its bytes, and what others have pinned."""
        per_rank, others = self._pool.bytes_per_rank, [r for r in self._records.values() if r is not record]
        ranks = sum(padded(other.rank) for other in others) * per_rank
        extras = sum(grains(other.extras_bytes) for other in others)
        arena = self._pool.extras.nbytes // GRAIN_BYTES * GRAIN_BYTES
        return [
            ("adapter_device_bytes", padded(record.rank) * per_rank, self._pool.num_ranks * per_rank, ranks),
            ("adapter_extras_bytes", grains(record.extras_bytes), arena, extras),
        ]
