# SPDX-License-Identifier: Apache-2.0
"""Whose adapters are on the device: what a tenant's cap of resident bytes counts, and what must go for one more."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from multilora_backend.scheduling.interface import Adapters
from multilora_backend.scheduling.lines import Line


class Ledger:
    """An adapter counts as the tenant's that was the last to ask for it. Only tenants with a cap have entries."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._owner: dict[str, str] = {}
        self._of: dict[str, dict[str, None]] = {}
        """By tenant, who was asked for longest ago first."""

    def asked(self, line: Line) -> None:
        """The line's tenant has asked for its adapter."""
        self._forget(line.adapter)
        if line.quota.tenant.adapter_bytes:
            self._owner[line.adapter] = line.tenant
            self._of.setdefault(line.tenant, {})[line.adapter] = None

    def admits(self, line: Line, running: Collection[str]) -> bool:
        """True if the line's tenant may have its adapter on the device; idle ones of its own are evicted for that.

        `running` are adapters that sequences run with.
        """
        need, there = self._adapters.device_bytes(line.adapter)
        if there and self._owner.get(line.adapter) == line.tenant:
            return True
        held: dict[str, int] = {}
        for key in list(self._of.get(line.tenant, ())):
            nbytes, has = self._adapters.device_bytes(key)
            if has:
                held[key] = nbytes
            elif not nbytes and self._adapters.loading(key):
                if not need and key != line.adapter:
                    return False  # one adapter of unknown size at a time: it may be as large as the whole cap
            else:
                self._forget(key)
        idle = [key for key in held if key not in running]
        chosen = to_give_up(held, idle, need, line.quota.tenant.adapter_bytes)
        return chosen is not None and all(self._adapters.give_up(key) for key in chosen)

    def _forget(self, key: str) -> None:
        owner = self._owner.pop(key, None)
        if owner is not None:
            del self._of[owner][key]
            if not self._of[owner]:
                del self._of[owner]


def to_give_up(held: Mapping[str, int], idle: Collection[str], need: int, cap: int) -> list[str] | None:
    """Adapters that a tenant has to give up so that `need` more bytes stay within its cap; None if it cannot yet.

    `held` are its bytes by adapter, `idle` those that nothing runs with, the first to go first. What is larger than
    the whole cap may come alone: it was let in before its size was known.
    """
    excess = sum(held.values()) + need - cap
    chosen: list[str] = []
    for key in idle:
        if excess <= 0:
            break
        chosen.append(key)
        excess -= held[key]
    return chosen if excess <= 0 or len(chosen) == len(held) else None
