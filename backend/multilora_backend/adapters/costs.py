# SPDX-License-Identifier: Apache-2.0
"""How long a load would take, from how long the last ones took."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT = 0.2
"""Of the newest measurement in the running mean: about the last ten count."""


@dataclass
class Speed:
    """Bytes per second of one way; a small load counts as much as a large one, as its latency is part of it."""

    bytes_per_s: float

    def measured(self, nbytes: int, seconds: float) -> None:
        if nbytes > 0 and seconds > 0:
            # The mean of seconds per byte, not of its inverse: one cached read of 10 us must not promise anything.
            pace = (1 - WEIGHT) / self.bytes_per_s + WEIGHT * seconds / nbytes
            self.bytes_per_s = 1 / pace


@dataclass
class LoadCosts:
    """Until something has been measured: a local NVMe disk, and PCIe 5."""

    disk: Speed
    device: Speed
    mean_bytes: float = 0.0
    """Of the adapters that were read, for those that have not been."""

    @classmethod
    def unmeasured(cls) -> LoadCosts:
        return cls(Speed(2e9), Speed(50e9))

    def read(self, nbytes: int, seconds: float) -> None:
        self.mean_bytes += (nbytes - self.mean_bytes) * (WEIGHT if self.mean_bytes else 1.0)
        self.disk.measured(nbytes, seconds)

    def copied(self, nbytes: int, seconds: float) -> None:
        self.device.measured(nbytes, seconds)

    def seconds(self, nbytes: int, in_host: bool, ahead: float = 0.0) -> float:
        """Until ACTIVE for an adapter of `nbytes` (0: unknown); `ahead` loads come first."""
        size = nbytes or self.mean_bytes
        copy = size / self.device.bytes_per_s
        return copy if in_host else copy + size / self.disk.bytes_per_s * (1 + ahead)
