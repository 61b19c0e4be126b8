# SPDX-License-Identifier: Apache-2.0
"""Whose adapters are on the device: what a tenant's cap of resident bytes counts, and what must go for one more."""

from __future__ import annotations

from collections.abc import Mapping


class Ledger:
    """An adapter counts as the tenant's that was the last to ask for it. Only tenants with a cap have entries."""

    def __init__(self) -> None:
        self._owner: dict[str, str] = {}
        self._of: dict[str, dict[str, None]] = {}
        """By tenant, who asked longest ago first."""

    def asked(self, key: str, tenant: str) -> None:
        self.forget(key)
        self._owner[key] = tenant
        self._of.setdefault(tenant, {})[key] = None

    def forget(self, key: str) -> None:
        owner = self._owner.pop(key, None)
        if owner is not None:
            del self._of[owner][key]
            if not self._of[owner]:
                del self._of[owner]

    def of(self, tenant: str) -> list[str]:
        return list(self._of.get(tenant, ()))

    def owner(self, key: str) -> str | None:
        return self._owner.get(key)


def to_give_up(held: Mapping[str, int], idle: Mapping[str, None], need: int, cap: int) -> list[str] | None:
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
