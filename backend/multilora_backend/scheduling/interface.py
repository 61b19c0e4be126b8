# SPDX-License-Identifier: Apache-2.0
"""What the scheduler needs of the adapter manager."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from multilora_backend.adapters.state import AdapterState, Lease


class Adapters(Protocol):
    """What the scheduler needs of the adapter manager, by key. Nothing here may block.

    Keys of waiting or running sequences are known; where others may be gone, it says what follows.
    """

    def request(self, key: str, protect: Collection[str] = ()) -> AdapterState:
        """Asks for an adapter to become ACTIVE. Room is never made by evicting one of `protect`."""
        ...

    def loading(self, key: str) -> bool:
        """True while it is read or copied; what comes of that needs no further `request`. False if it is gone."""
        ...

    def waits_for_room(self, key: str) -> bool:
        """True if the adapter cannot be loaded before leases of others are given back."""
        ...

    def lease(self, key: str) -> Lease | None: ...

    def release(self, lease: Lease) -> None: ...

    def resident(self) -> Collection[str]:
        """Keys of the ACTIVE adapters."""
        ...

    def load_cost_s(self, key: str) -> float:
        """Seconds until it would be ACTIVE if it were asked for; 0 if it is. Raises MultiloraError if it is gone."""
        ...

    def prefetch(self, key: str) -> None:
        """Brings it to the host, if it is not there."""
        ...

    def device_bytes(self, key: str) -> tuple[int, bool]:
        """Bytes that it takes on the device, or would, and whether it has them. 0 while unknown, and if it is gone."""
        ...

    def give_up(self, key: str) -> bool:
        """Evicts it; False if it must stay: it is leased or pinned, say."""
        ...
