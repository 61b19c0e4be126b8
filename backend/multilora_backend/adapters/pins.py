# SPDX-License-Identifier: Apache-2.0
"""Which adapters stay on the device once they are there, and what that leaves for the others."""

from __future__ import annotations

from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.state import AdapterRecord
from multilora_backend.errors import ErrorCode, MultiloraError


class Pins:
    """The pool can be moved together, so pins fit if their ranks add up. An unknown rank counts when it is known."""

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
        taken = self._ranks_without(record)
        if not record.rank or padded(record.rank) <= self._pool.num_ranks - taken:
            return ""
        per_rank = self._pool.bytes_per_rank
        return (
            f"{record.entry.name} cannot be pinned: it needs {padded(record.rank) * per_rank} bytes, and of the "
            f"{self._pool.num_ranks * per_rank} of adapter_device_bytes {taken * per_rank} are pinned"
        )

    def in_the_way(self, record: AdapterRecord) -> str:
        """Why an adapter of known rank cannot be loaded as long as all of them stay; empty if it can."""
        if not self._records:
            return ""
        left = self._pool.num_ranks - self._ranks_without(record)
        if padded(record.rank) <= left:
            return ""
        per_rank = self._pool.bytes_per_rank
        return (
            f"it needs {padded(record.rank) * per_rank} bytes on the device, and pinned adapters leave "
            f"{left * per_rank}; unpin some"
        )

    def _ranks_without(self, record: AdapterRecord) -> int:
        return sum(padded(other.rank) for other in self._records.values() if other is not record)
