# SPDX-License-Identifier: Apache-2.0
"""What the engine must hear of after a poll of the adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from multilora_backend.adapters.state import AdapterRecord


@dataclass
class Polled:
    failed: list[str] = field(default_factory=list)
    """Keys that cannot be served: whoever waits for them ends with `AdapterManager.reason`."""
    moved: list[tuple[str, str]] = field(default_factory=list)
    """Keys of which nothing is left, and what those of their holders go on with who have no output yet."""
    read: list[AdapterRecord] = field(default_factory=list)
    """Whose version is known now."""
    looked_at: list[str] = field(default_factory=list)
    """Keys that were read or checked while sequences wait for them: it is known now what tokens they have."""
    stale: list[AdapterRecord] = field(default_factory=list)
    """Compositions that cannot be made any more, as sources of parts have changed."""
