# SPDX-License-Identifier: Apache-2.0
"""Sequences as far as adapters see them: they hold a revision, run with leases, pause, and end."""

from __future__ import annotations

from dataclasses import dataclass

from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.polled import Polled
from multilora_backend.adapters.state import AdapterState, Lease


@dataclass(eq=False)
class Holder:
    key: str
    version: str = ""
    """With which it has begun."""
    lease: Lease | None = None


class Holders:
    def __init__(self, manager: AdapterManager) -> None:
        self.manager = manager
        self.all: list[Holder] = []

    def add(self, key: str) -> None:
        self.manager.hold(key)
        self.all.append(Holder(key))

    def of(self, key: str) -> list[Holder]:
        return [holder for holder in self.all if holder.key == key]

    def run(self, holder: Holder) -> None:
        """Takes a lease if there is one."""
        holder.lease = self.manager.lease(holder.key)
        active = self.manager.records[holder.key].state is AdapterState.ACTIVE
        assert (holder.lease is not None) == active
        if holder.lease is not None:
            assert holder.version in ("", holder.lease.version), "half of one and half of another adapter"
            holder.version = holder.lease.version

    def pause(self, holder: Holder) -> None:
        if holder.lease is not None:
            self.manager.release(holder.lease)
            holder.lease = None

    def end(self, holder: Holder) -> None:
        self.all.remove(holder)
        self.pause(holder)
        self.manager.drop(holder.key)

    def take_in(self, polled: Polled) -> None:
        """As `engine.adapters.see_to_holders`."""
        for key in polled.failed:
            assert self.manager.records[key].state is AdapterState.FAILED
            assert self.manager.reason(key)
            for holder in self.of(key):
                self.end(holder)
        for key, successor in polled.moved:
            for holder in self.of(key):
                assert holder.lease is None
                if not holder.version:
                    self.add(successor)
                self.end(holder)
