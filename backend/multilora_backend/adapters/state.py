# SPDX-License-Identifier: Apache-2.0
"""The life of an adapter: five states, one table of legal transitions, one method that changes the state."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING

from multilora_backend.added_tokens import NO_TOKENS, AddedTokens

if TYPE_CHECKING:
    from multilora_backend.adapters.entry import AdapterEntry

Fingerprint = tuple[tuple[int, int, int] | None, ...]
"""(mtime in ns, size, inode) of each file of an adapter's folder, None for a file that is not there."""

Chosen = tuple[tuple["AdapterRecord", Decimal], ...]
"""Parts of a composition, and their weights."""

MAX_HISTORY = 16
"""Changes of state that a record remembers."""


class AdapterState(str, Enum):
    COLD = "cold"
    """Not on the device, nor asked for; its weights may be in the host cache, or on their way there."""
    LOADING = "loading"
    """A place on the device is wanted or taken, and its weights are being read or copied."""
    ACTIVE = "active"
    """All of it is in the device pool: it can be leased."""
    EVICTING = "evicting"
    FAILED = "failed"
    """Refused, with the reason: until its source changes, or, if the cause may pass, until it is tried again."""


_LEGAL: dict[AdapterState, frozenset[AdapterState]] = {
    # COLD -> FAILED: by a check, which reads no weights, or by what was read for the host only.
    AdapterState.COLD: frozenset({AdapterState.LOADING, AdapterState.FAILED}),
    # LOADING -> FAILED: by what the folder holds, or because the copy to the device failed.
    # LOADING -> COLD: the rank turned out larger than what was reserved, and leases are in the way.
    AdapterState.LOADING: frozenset({AdapterState.ACTIVE, AdapterState.FAILED, AdapterState.COLD}),
    AdapterState.ACTIVE: frozenset({AdapterState.EVICTING}),
    AdapterState.EVICTING: frozenset({AdapterState.COLD}),
    # FAILED -> FAILED: refused for want of room while it was being read, and the reading has failed as well.
    AdapterState.FAILED: frozenset({AdapterState.COLD, AdapterState.FAILED}),
}


@dataclass(eq=False)
class AdapterRecord:
    """What is known about one revision of an adapter. Owned by the engine's thread."""

    key: str
    """See `core.adapter_name`."""
    entry: AdapterEntry
    """What asked for this revision."""
    parts: Chosen = ()
    """Of a composition: the revisions that it is made of."""
    wholes: dict[str, AdapterRecord] = field(default_factory=dict, init=False)
    """Compositions that it is a part of, by key."""

    state: AdapterState = field(default=AdapterState.COLD, init=False)
    since: float = field(default=0.0, init=False)
    """When the state last changed, or the record was made, on the manager's clock."""
    reason: str = field(default="", init=False)
    """Why it is FAILED; empty in every other state."""
    note: str = field(default="", init=False)
    """Why something that was wanted of it was refused: a pin, or a successor."""
    history: list[tuple[float, AdapterState, str]] = field(default_factory=list, init=False)
    """The last changes of state, the oldest first: time, state, reason."""
    fingerprint: Fingerprint | None = field(default=None, init=False)
    """Of the folder when it was last read; None if it never was, or if reading failed for a passing cause."""
    refused: Fingerprint | None = field(default=None, init=False)
    """Of the folder whose content made it FAILED: another one is worth a try."""
    version: str = field(default="", init=False)
    """Content hash. Once known it never changes: another content is another revision. Empty if unread."""
    rank: int = field(default=0, init=False)
    """Largest rank of a module; 0 while unknown."""
    extras_bytes: int = field(default=0, init=False)
    """Of the device's memory for what it has besides A and B."""
    vocabulary: int = field(default=0, init=False)
    """Tokens that it knows; 0: those of the base model, or unread."""
    tokens: AddedTokens = field(default=NO_TOKENS, init=False)
    """That its tokenizer has and the base model's has not; none: there are none, or unread."""
    nbytes: int = field(default=0, init=False)
    """On the host, in device layout."""
    no_effect: bool = field(default=False, init=False)
    """It changes nothing (every B is zero, say): allowed, but hardly what was meant."""
    retired: bool = field(default=False, init=False)
    """Replaced or unloaded: it serves those that hold it, then its bytes are given back."""
    pinned: bool = field(default=False, init=False)
    """Once on the device it stays there."""
    kept: bool = field(default=False, init=False)
    """The host cache was told not to drop its weights."""
    passing: bool = field(default=False, init=False)
    """FAILED for a cause outside of its content, which may pass."""
    retry_at: float = field(default=0.0, init=False)
    """FAILED: when to try again, or, if its content is to blame, when to look at the source again."""
    attempts: int = field(default=0, init=False)
    """Loads that failed one after the other."""
    leases: int = field(default=0, init=False)
    holds: int = field(default=0, init=False)
    """Sequences between submission and end, and aliases that name this version."""
    requests: int = field(default=0, init=False)
    loads: int = field(default=0, init=False)
    load_seconds: float = field(default=0.0, init=False)
    """Duration of the last load, from its request until ACTIVE."""
    last_used: float | None = field(default=None, init=False)

    @property
    def title(self) -> str:
        """As a client named it."""
        return self.entry.source.text if self.parts else self.entry.name

    @property
    def ends(self) -> bool:
        """Nobody will ask for it again."""
        return self.retired and not self.holds and not self.leases

    def transition(self, to: AdapterState, now: float, reason: str = "") -> None:
        """The only way to change `state`. Raises RuntimeError on what the table or a lease forbids."""
        if to not in _LEGAL[self.state]:
            raise RuntimeError(f"adapter {self.key}: illegal transition {self.state.name} -> {to.name}")
        if self.leases:
            raise RuntimeError(f"adapter {self.key}: {to.name} while {self.leases} leases are held")
        if (to is AdapterState.FAILED) != bool(reason):
            raise RuntimeError(f"adapter {self.key}: a reason belongs to FAILED and only to it")
        self.state = to
        self.since = now
        self.reason = reason
        self.history.append((now, to, reason))
        del self.history[:-MAX_HISTORY]


@dataclass(frozen=True)
class Lease:
    """The right to run with an adapter: while it is held, this version stays on the device, in this slot."""

    name: str
    """The revision's key."""
    version: str
    """Content hash; prefix-cache blocks are keyed by it."""
    slot: int
    """Index into the pool's tables, which alone say where its ranks lie in a step: it may have been moved since."""
    rank_start: int
    """When the lease was given, as the generation."""
    rank: int
    generation: int = 0
    """No two adapters that were ever in this slot have the same; see `DevicePool.generation`."""
    invocation: tuple[int, ...] = ()
    """Tokens from which on it acts; empty: everywhere."""


@dataclass(frozen=True)
class AdapterStats:
    by_state: dict[str, int]
    """Revisions; every state is there, by its value."""
    loads_total: int
    load_failures_total: int
    """Refused by a check included."""
    evictions_total: int
    load_seconds: list[float]
    """Of the loads since the last call."""
    arrivals: dict[str, int]
    """Totals of sequences, by where their adapter was when they came: "device", "host" or "disk"."""
    residents: dict[str, tuple[str, int, bool]]
    """Level ("device" or "host"), rank and whether pinned, of every key whose weights are in memory."""
    max_resident: int
    """Adapters that the device pool would hold at the mean rank of those that it holds."""
    bytes: dict[str, tuple[int, int]]
    """By level: bytes taken or reserved, and the budget."""
