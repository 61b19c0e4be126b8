# SPDX-License-Identifier: Apache-2.0
"""The life of an adapter: five states, one table of legal transitions, one method that changes the state."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

Fingerprint = tuple[tuple[int, int, int] | None, ...]
"""(mtime in ns, size, inode) of each file of an adapter's folder, None for a file that is not there."""


class AdapterState(str, Enum):
    COLD = "cold"
    """Known by name; its weights may be in the host cache."""
    LOADING = "loading"
    """Being read, or being copied to the device."""
    ACTIVE = "active"
    """All of it is in the device pool: it can be leased."""
    EVICTING = "evicting"
    FAILED = "failed"
    """Refused, with the reason, until its folder changes."""


_LEGAL: dict[AdapterState, frozenset[AdapterState]] = {
    # COLD -> FAILED: the check at server start reads no weights, so nothing is loading.
    AdapterState.COLD: frozenset({AdapterState.LOADING, AdapterState.FAILED}),
    # LOADING -> FAILED: by what the folder holds, or because the copy to the device failed.
    # LOADING -> COLD: the rank turned out larger than what was reserved, and leases are in the way.
    AdapterState.LOADING: frozenset({AdapterState.ACTIVE, AdapterState.FAILED, AdapterState.COLD}),
    AdapterState.ACTIVE: frozenset({AdapterState.EVICTING}),
    AdapterState.EVICTING: frozenset({AdapterState.COLD}),
    AdapterState.FAILED: frozenset({AdapterState.COLD}),
}


@dataclass(eq=False)
class AdapterRecord:
    """What is known about one name of the catalogue. Owned by the engine's thread."""

    name: str
    path: Path

    state: AdapterState = field(default=AdapterState.COLD, init=False)
    since: float = field(default=0.0, init=False)
    """When the state last changed, on the manager's clock."""
    reason: str = field(default="", init=False)
    """Why it is FAILED; empty in every other state."""
    fingerprint: Fingerprint | None = field(default=None, init=False)
    """Of the folder when it was last read; None if it never was, or if reading failed for a passing cause."""
    version: str = field(default="", init=False)
    """Content hash of the weights last read from the folder as `fingerprint` has it; empty if unread."""
    rank: int = field(default=0, init=False)
    """Largest rank of a module; 0 while unknown."""
    extras_bytes: int = field(default=0, init=False)
    """Of the device's memory for what it has besides A and B."""
    nbytes: int = field(default=0, init=False)
    """On the host, in device layout."""
    no_effect: bool = field(default=False, init=False)
    """The last weights read change nothing (every B is zero, say): allowed, but hardly what was meant."""
    looked_at: float = field(default=0.0, init=False)
    """When a FAILED adapter's folder was last looked at for changes."""
    load_seconds: float = field(default=0.0, init=False)
    """Duration of the last load, from its request until ACTIVE."""
    leases: int = field(default=0, init=False)
    last_used: float = field(default=0.0, init=False)

    def transition(self, to: AdapterState, now: float, reason: str = "") -> None:
        """The only way to change `state`. Raises RuntimeError on what the table or a lease forbids."""
        if to not in _LEGAL[self.state]:
            raise RuntimeError(f"adapter {self.name}: illegal transition {self.state.name} -> {to.name}")
        if self.leases:
            raise RuntimeError(f"adapter {self.name}: {to.name} while {self.leases} leases are held")
        if (to is AdapterState.FAILED) != bool(reason):
            raise RuntimeError(f"adapter {self.name}: a reason belongs to FAILED and only to it")
        self.state = to
        self.since = now
        self.reason = reason


@dataclass(frozen=True)
class Lease:
    """The right to run with an adapter: while it is held, this version stays where it is."""

    name: str
    version: str
    """Content hash; prefix-cache blocks are keyed by it."""
    slot: int
    """Index into the pool's rank_start and rank."""
    rank_start: int
    rank: int
    generation: int = 0
    """No two adapters that were ever in this slot have the same; see `DevicePool.generation`."""


@dataclass(frozen=True)
class AdapterStats:
    by_state: dict[str, int]
    """Every state is there, by its value."""
    loads_total: int
    load_failures_total: int
    """Refused by the check at server start included."""
    evictions_total: int
    load_seconds: list[float]
    """Of the loads since the last call."""
