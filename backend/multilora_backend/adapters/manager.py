# SPDX-License-Identifier: Apache-2.0
"""Everything about adapters that the engine, the scheduler and operators ask for. See docs/adapters.md.

All of it runs on the engine's thread and returns at once; only the loader and the state file have threads. Engine and
scheduler speak of keys, which stand for one revision each (`core.adapter_name`); clients and operators of names.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.commands import Admit, Commands
from multilora_backend.adapters.compositions import Compositions
from multilora_backend.adapters.extras import extra_keys
from multilora_backend.adapters.host import HostCache
from multilora_backend.adapters.jobs import Purpose
from multilora_backend.adapters.lifecycle import Lifecycle
from multilora_backend.adapters.loader import Loader, peft_loader
from multilora_backend.adapters.polled import Polled
from multilora_backend.adapters.pool import MAX_RANKS, DevicePool
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.readings import Readings
from multilora_backend.adapters.remembered import Remembered
from multilora_backend.adapters.room import grains
from multilora_backend.adapters.sources import Source
from multilora_backend.adapters.state import AdapterRecord, AdapterState, AdapterStats, Lease
from multilora_backend.adapters.statefile import StateFile
from multilora_backend.added_tokens import AddedTokens
from multilora_backend.composition import is_composed, parse
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

log = logging.getLogger(__name__)


def _nothing_else(text: str) -> Source:
    raise invalid("source", f"{text!r} is not below any of adapter_roots")


class AdapterManager(Commands):
    """Engine-thread API. See `AdapterState` for the states and `scheduling.interface.Adapters` for its caller."""

    def __init__(
        self,
        catalogue: Catalogue | None,
        sites: Sequence[LoraSite],
        *,
        device_bytes: int,
        host_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str,
        load_threads: int = 2,
        max_ranks: int = MAX_RANKS,
        base: BaseModel | None = None,
        extras_bytes: int = 0,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        loader: Loader | None = None,
        pool: DevicePool | None = None,
        locate: Callable[[Source], Path] | None = None,
        admit: Admit = _nothing_else,
        watched: bool = False,
        state: StateFile | None = None,
    ) -> None:
        """`catalogue` None: LoRA is off. `on_change` is called from loader threads when `poll` has news.

        `pool` and `loader`: instead of those of `device_bytes` and threads. `locate` gives the folder of a source, in
        a loader thread; `admit` reads a source that a command names. `watched`: `reconcile` tells of every change of
        the configured adapters. `state`: where to remember what commands do. Without `base`, or `extras_bytes` of the
        device's memory, adapters with more than A and B are refused.
        """
        enabled = catalogue is not None
        if pool is None:
            sites, extras_bytes = (sites, extras_bytes) if enabled else ((), 0)
            keys = extra_keys(sites, base)
            pool = DevicePool(sites, device_bytes, dtype, device, max_ranks, keys, extras_bytes)
        self.pool = pool if enabled else None
        if loader is None:
            cuda, threads = pool.device.type == "cuda", load_threads if enabled else 0
            more = {} if locate is None else {"locate": locate}
            loader = peft_loader(sites, dtype, cuda, threads, on_change, base=base, **more)
        self._loader = loader
        # One waiting load a thread keeps the threads busy; more would only fix an order that may change.
        readings = Readings(loader, 2 * load_threads)
        life = Lifecycle(pool, HostCache(host_bytes), readings, clock, watched)
        super().__init__(life, Remembered(state, clock), admit, enabled)
        self.records: Mapping[str, AdapterRecord] = life.books.records
        """By key; every revision that is current, may become it, or is being given back."""
        self._compositions = Compositions(self.revisions, life)
        self.held = 0
        """Holds of sequences: none when there are no sequences."""
        self._restore_loaded()
        for entry in catalogue.entries if catalogue is not None else ():
            self._add_configured(entry)
        self._restore_aliases()

    def check_all(self, wait_s: float = 0.0) -> None:
        """Starts checks of all configs and headers, waiting at most `wait_s`; `poll` makes the broken ones FAILED.

        Those of this machine: others would have to be downloaded, wanted or not.
        """
        for record in list(self.records.values()):
            cold = record.state is AdapterState.COLD and record.key not in self._life.readings
            if cold and record.entry.source.is_local:
                self._life.readings.submit(record, Purpose.CHECK)
        self._loader.wait_idle(wait_s)

    def resolve(self, asked: str, tenant: str = "") -> str:
        """The key of what a client asks for by a name, an alias or `name@version`, or by several with weights.

        Empty if their weights leave only the base model. Raises MultiloraError: unknown, not for this tenant, FAILED
        (with the reason), or a composition that can never be resident.
        """
        self._require_enabled()
        if is_composed(asked):
            parts = [(self._resolved(part.name, tenant), part.weight) for part in parse("lora_name", asked)]
            return self._compositions.key(parts)
        return self._resolved(asked, tenant).key

    def _resolved(self, asked: str, tenant: str) -> AdapterRecord:
        name, version = self.registry.follow(asked)
        entry = self.registry.get(name)
        if entry is not None and not entry.admits(tenant):
            who = f"tenant {tenant!r}" if tenant else "requests without a tenant"
            raise MultiloraError(ErrorCode.INVALID_ARG, f"LoRA {asked} is not for {who}")
        record = self._find(name, version)
        if record.state is AdapterState.FAILED and not self._life.revive(record):
            raise MultiloraError(ErrorCode.INTERNAL, self.reason(record.key))
        return record

    def reason(self, key: str) -> str:
        """Why requests for a FAILED revision end."""
        record = self._record(key)
        return f"LoRA {record.title} could not be loaded: {record.reason}"

    def vocabulary(self, key: str) -> int:
        """Tokens that a revision knows; 0: those of the base model, as far as is known before it was looked at."""
        return self._record(key).vocabulary

    def looked_at(self, key: str) -> bool:
        """Whether its folder was checked or read, so that it is known what tokens it has."""
        return self._record(key).rank > 0

    def tokens(self, key: str) -> AddedTokens:
        """Tokens of a revision that the base model does not know; none before it was looked at."""
        return self._record(key).tokens

    def hold(self, key: str) -> None:
        """A sequence has this revision from now on; each hold is ended by `drop`. Its bytes stay until then."""
        record = self._record(key)
        record.requests += 1
        self.held += 1
        self.revisions.arrivals[self._life.level(record)] += 1
        self.revisions.hold(record)

    def drop(self, key: str) -> None:
        """A sequence has ended, or goes on with another revision. Raises RuntimeError if the hold is not held."""
        self.revisions.drop(self._record(key))
        self.held -= 1

    def request(self, key: str, protect: Collection[str] = ()) -> AdapterState:
        """Asks for an adapter to become ACTIVE; call again while it is COLD: leases or other loads are in its way.

        Room is made by moving adapters together and by evicting what was used least recently, has no leases, is not
        pinned and not in `protect`.
        """
        return self._life.request(self._record(key), protect)

    def prefetch(self, key: str) -> None:
        """Brings an adapter to the host, if loads that somebody waits for leave a thread to do it."""
        self._life.prefetch(self._record(key))

    def load_cost_s(self, key: str) -> float:
        """Estimated seconds until it would be ACTIVE, without waiting for room: 0 if it is, infinite if FAILED."""
        return self._life.load_cost_s(self._record(key))

    def waits_for_room(self, key: str) -> bool:
        """True if the last `request` was in vain because of leases, and not because other loads come first."""
        return self._life.waits_for_room(self._record(key))

    def loading(self, key: str) -> bool:
        """True from a `request` that was heard until the adapter is ACTIVE, or will not be; what is gone will not."""
        record = self.records.get(key)
        return record is not None and record.state is AdapterState.LOADING

    def lease(self, key: str) -> Lease | None:
        """None unless ACTIVE. Give each lease back by `release`."""
        lease = self._life.residency.leases.get(key)
        if lease is not None:
            record = self.records[key]
            record.leases += 1
            record.last_used = self._life.books.clock()
        return lease

    def release(self, lease: Lease) -> None:
        """Raises RuntimeError if the lease is not held."""
        record = self.records.get(lease.name)
        if record is None or self._life.residency.leases.get(lease.name) != lease or record.leases < 1:
            raise RuntimeError(f"adapter {lease.name}: a lease is given back that is not held")
        record.leases -= 1
        record.last_used = self._life.books.clock()
        self._life.residency.look_again()
        self.revisions.settle(record)

    def resident(self) -> Collection[str]:
        """Keys of the ACTIVE adapters."""
        return self._life.residency.leases.keys()

    def in_host(self, key: str) -> bool:
        return self._record(key).version in self._life.host

    def device_bytes(self, key: str) -> tuple[int, bool]:
        """Bytes that it takes in the pool, or would, 0 while its rank is unknown; and whether it has them.

        What is gone has none: the scheduler may remember it for longer.
        """
        residency, record = self._life.residency, self.records.get(key)
        if record is None:
            return 0, False
        place = residency.place(key)
        rank = record.rank if place is None else place.rank
        return padded(rank) * residency.pool.bytes_per_rank + grains(record.extras_bytes), place is not None

    def give_up(self, key: str) -> bool:
        """Evicts an ACTIVE adapter; False if it is none, leased, pinned, or the last copy of what somebody holds."""
        return self._life.residency.give_up(self._record(key))

    def active_since(self, key: str) -> float:
        """When an ACTIVE adapter became it, on the manager's clock."""
        return self._record(key).since

    @property
    def transferring(self) -> bool:
        """Weights are on their way to the device. Nobody calls `on_change` when they arrive: `poll` every ms or so."""
        return self._life.residency.transferring

    def poll(self) -> Polled:
        """Takes in what has been read and what has arrived; returns whose holders cannot go on as they are."""
        polled = self.revisions.poll()
        self._compositions.take_in(polled)
        for record in polled.read:
            self._remembered.read(record)
        self._remembered.save(self.registry, self._alias_holds)
        return polled

    def stats(self) -> AdapterStats:
        return self._life.stats(self.revisions.arrivals)

    def close(self) -> None:
        self._loader.close()
        self._remembered.save(self.registry, self._alias_holds, at_once=True)
        self._remembered.close()

    def _record(self, key: str) -> AdapterRecord:
        record = self.records.get(key)
        if record is None:
            self._require_enabled()
            raise self.registry.unknown(key)
        return record
