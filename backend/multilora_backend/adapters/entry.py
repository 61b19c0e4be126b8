# SPDX-License-Identifier: Apache-2.0
"""What somebody wants to be served: one name, where it comes from, and who may use it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from multilora_backend.adapters.sources import Source
from multilora_backend.adapters.state import Fingerprint


class Origin(str, Enum):
    CONFIG = "config"
    """The configured folder or file, which is watched: what disappears there is removed."""
    ADMIN = "admin"
    """A command; only another command changes it."""


@dataclass(frozen=True)
class AdapterEntry:
    """Desired state of one name. Two that are equal ask for the same thing, so nothing is to be done."""

    name: str
    source: Source
    """Parsed and admitted: its text shows and compares it."""
    origin: Origin = Origin.CONFIG
    pinned: bool = False
    tenants: tuple[str, ...] = ()
    """Patterns (fnmatch) of the tenants that may use it; empty: everybody."""
    version: str = ""
    """Content hash that the source must have, or the first digits of it; empty: any."""
    fingerprint: Fingerprint | None = None
    """Of a local folder when the watcher last saw it: another one is another revision. None: not looked at."""

    def admits(self, tenant: str) -> bool:
        return not self.tenants or any(fnmatchcase(tenant, pattern) for pattern in self.tenants)
