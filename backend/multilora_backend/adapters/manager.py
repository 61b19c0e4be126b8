# SPDX-License-Identifier: Apache-2.0
"""Which adapters are on the device: loading off the step loop, leases, eviction, and the reasons for failures.

Everything here runs on the engine's thread and returns at once; only `Loader` has threads. Device memory is
reserved when an adapter is requested, not when its weights have been read: whoever is requested first gets the
room, and a reservation cannot be taken by a later request while its owner's weights are on their way. That goes
for the way from the disk and for the way to the device: an adapter is LOADING until its last byte is there.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch

from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.extras import affine_keys
from multilora_backend.adapters.host import HostCache
from multilora_backend.adapters.loader import Job, Loader, Outcome, ThreadLoader
from multilora_backend.adapters.peft import check_adapter, fingerprint, read_adapter
from multilora_backend.adapters.pool import MAX_RANKS, DevicePool, Transfer
from multilora_backend.adapters.ranks import Place, padded
from multilora_backend.adapters.room import Room
from multilora_backend.adapters.state import AdapterRecord, AdapterState, AdapterStats, Lease
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError

log = logging.getLogger(__name__)

RECHECK_S = 1.0
"""A FAILED adapter's folder is looked at again this often at most: that is file system access on the step loop."""


class AdapterManager:
    """Engine-thread API. See `AdapterState` for the states and `scheduling.scheduler.Adapters` for its caller."""

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
    ) -> None:
        """`catalogue` None: LoRA is off. `on_change` is called from loader threads when `poll` has news.

        Without `base`, or `extras_bytes` of the device's memory, adapters with more than A and B are refused.
        """
        enabled = catalogue is not None
        self._catalogue = catalogue or Catalogue([])
        sites, extras_bytes = (sites, extras_bytes) if enabled else ((), 0)
        self._pool = DevicePool(sites, device_bytes, dtype, device, max_ranks, affine_keys(sites), extras_bytes)
        self.pool = self._pool if enabled else None
        self.records = {name: AdapterRecord(name, self._catalogue.path(name)) for name in self._catalogue}
        self._places = Room(self._pool.num_ranks, self._pool.extras.nbytes)
        self._host = HostCache(host_bytes)
        self._clock = clock
        self._loader = loader or ThreadLoader(
            partial(read_adapter, sites=sites, dtype=dtype, pin=self._pool.device.type == "cuda", base=base),
            partial(check_adapter, sites=sites, base=base),
            load_threads if enabled else 0,
            on_change,
        )
        # One waiting load a thread keeps the threads busy; more would only fix an order that may change.
        self._max_loading = 2 * load_threads
        self._loading: dict[str, frozenset[str]] = {}
        """LOADING adapters whose weights are being read, and what their request may not evict."""
        self._transfers: dict[str, tuple[Transfer, Lease]] = {}
        """LOADING adapters whose weights are on their way to the device, and what can be leased then."""
        self._leases: dict[str, Lease] = {}
        """ACTIVE adapters."""
        self._no_room_for: float = math.inf
        """Ranks that were asked for in vain since the last poll or release: larger requests need not look again."""
        self._no_room_for_extras: set[str] = set()
        """Adapters with extras that asked in vain since then: it may be the arena that is full, not the ranks."""
        self._by_state = Counter(dict.fromkeys(AdapterState, 0))
        self._by_state[AdapterState.COLD] = len(self.records)
        self._loads = self._failures = self._evictions = 0
        self._load_seconds: list[float] = []
        self._failed: list[str] = []
        """Since the last poll."""

    def check_all(self, wait_s: float = 0.0) -> None:
        """Starts checks of all configs and headers, waiting at most `wait_s`; `poll` makes the broken ones FAILED."""
        for record in self.records.values():
            if record.state is AdapterState.COLD:
                self._loader.submit(Job(record.name, record.path, weights=False))
        self._loader.wait_idle(wait_s)

    def check(self, name: str) -> None:
        """Raises MultiloraError if requests for this adapter cannot be served."""
        record = self._record(name)
        if record.state is not AdapterState.FAILED:
            return
        now = self._clock()
        if now - record.looked_at >= RECHECK_S:
            record.looked_at = now
            if fingerprint(record.path) != record.fingerprint:
                self._move(record, AdapterState.COLD)
                return
        raise MultiloraError(ErrorCode.INTERNAL, f"LoRA {name} could not be loaded: {record.reason}")

    def request(self, name: str, protect: Collection[str] = ()) -> AdapterState:
        """Asks for an adapter to become ACTIVE; call again while it is COLD: leases or other loads are in its way.

        Room is made by evicting what was used least recently, has no leases, and is not in `protect`.
        """
        record = self._record(name)
        if record.state is not AdapterState.COLD or len(self._loading) >= self._max_loading:
            return record.state
        # Before an adapter is looked at its rank is unknown: room is then found when it has been read.
        if not record.rank or self._reserve(record, protect) is not None:
            self._loading[name] = frozenset(protect)
            self._move(record, AdapterState.LOADING)
            cached = self._host.get(record.version)
            self._loader.submit(Job(name, record.path, True, record.fingerprint, cached))
        return record.state

    def waits_for_room(self, name: str) -> bool:
        """True if the last `request` was in vain because of leases, and not because other loads come first."""
        record = self._record(name)
        in_vain = padded(record.rank) >= self._no_room_for or name in self._no_room_for_extras
        return record.state is AdapterState.COLD and record.rank > 0 and in_vain

    def lease(self, name: str) -> Lease | None:
        """None unless ACTIVE. Give each lease back by `release`."""
        lease = self._leases.get(name)
        if lease is not None:
            record = self.records[name]
            record.leases += 1
            record.last_used = self._clock()
        return lease

    def release(self, lease: Lease) -> None:
        """Raises RuntimeError if the lease is not held."""
        record = self.records[lease.name]
        if self._leases.get(lease.name) != lease or record.leases < 1:
            raise RuntimeError(f"adapter {lease.name}: a lease is given back that is not held")
        record.leases -= 1
        record.last_used = self._clock()
        self._forget_who_found_no_room()

    def resident(self) -> Collection[str]:
        """Names of the ACTIVE adapters."""
        return self._leases.keys()

    def in_host(self, name: str) -> bool:
        """Whether the host cache has the weights that were last read."""
        return self._record(name).version in self._host

    @property
    def transferring(self) -> bool:
        """Weights are on their way to the device. Nobody calls `on_change` when they arrive: `poll` every ms or so."""
        return bool(self._transfers)

    def poll(self) -> list[str]:
        """Takes in what has been read and what has arrived; returns what FAILED, whose requests cannot be served."""
        self._forget_who_found_no_room()
        for outcome in self._loader.finished():
            record = self.records[outcome.job.name]
            if outcome.job.weights:
                self._loaded(record, outcome)
            elif record.state is AdapterState.COLD and not record.version:
                self._checked(record, outcome)
        for name in list(self._transfers):
            self._arrived(self.records[name])
        failed, self._failed = self._failed, []
        return failed

    def stats(self) -> AdapterStats:
        seconds, self._load_seconds = self._load_seconds, []
        by_state = {state.value: count for state, count in self._by_state.items()}
        return AdapterStats(by_state, self._loads, self._failures, self._evictions, seconds)

    def close(self) -> None:
        self._loader.close()

    def _record(self, name: str) -> AdapterRecord:
        if self.pool is None:
            raise MultiloraError(ErrorCode.INVALID_ARG, "LoRA feature is not enabled.")
        if name not in self.records:
            raise self._catalogue.unknown(name)
        return self.records[name]

    def _checked(self, record: AdapterRecord, outcome: Outcome) -> None:
        record.fingerprint = outcome.fingerprint
        if outcome.plan is not None:
            record.rank, record.extras_bytes = outcome.plan.rank, outcome.plan.extras_bytes
        reason = outcome.reason or self._pool.too_large(record.rank, record.extras_bytes)
        if reason:
            self._fail(record, reason)

    def _loaded(self, record: AdapterRecord, outcome: Outcome) -> None:
        protect = self._loading.pop(record.name)
        place = self._places.get(record.name)
        record.fingerprint = outcome.fingerprint
        record.version = ""
        weights = outcome.weights
        reason = outcome.reason if weights is None else self._pool.too_large(weights.rank, weights.extras_bytes)
        fits = weights is not None and self._places.holds(record.name, weights.rank, weights.extras_bytes)
        if place is not None and (reason or not fits):
            self._places.free(record.name)
            place = None
        if weights is None or reason:
            self._fail(record, reason)
            return
        record.version, record.rank, record.nbytes = weights.version, weights.rank, weights.nbytes
        record.extras_bytes = weights.extras_bytes
        record.no_effect = weights.no_effect
        self._host.put(weights)
        place = place or self._reserve(record, protect)
        if place is None:
            self._move(record, AdapterState.COLD)
            return
        try:
            extras_start = self._places.extras_start(record.name)
            transfer = self._pool.write(weights, place.slot, place.rank_start, extras_start)
        except RuntimeError as error:  # torch's, for whatever its device or its memory lacks
            self._lost(record, error)
            return
        generation = int(self._pool.generation[place.slot])
        lease = Lease(record.name, record.version, place.slot, place.rank_start, place.rank, generation)
        self._transfers[record.name] = transfer, lease

    def _arrived(self, record: AdapterRecord) -> None:
        """Makes an adapter ACTIVE if its transfer is done."""
        transfer, lease = self._transfers[record.name]
        try:
            if not transfer.done():
                return
        except RuntimeError as error:  # as above
            self._lost(record, error)
            return
        del self._transfers[record.name]
        record.load_seconds = self._clock() - record.since
        record.last_used = self._clock()
        self._move(record, AdapterState.ACTIVE)
        self._leases[record.name] = lease
        self._loads += 1
        self._load_seconds.append(record.load_seconds)
        if record.no_effect:
            log.warning("adapter %s: has no effect, all its deltas are zero", record.name)

    def _lost(self, record: AdapterRecord, error: RuntimeError) -> None:
        """A transfer failed. It says nothing about the folder, so the adapter may be asked for again."""
        self._transfers.pop(record.name, None)
        self._pool.clear(self._places.free(record.name).slot)
        record.fingerprint = None
        record.version = ""
        self._fail(record, f"cannot be copied to the device: {error}")

    def _reserve(self, record: AdapterRecord, protect: Collection[str]) -> Place | None:
        """Device memory for an adapter of known rank, evicting for it if need be."""
        if padded(record.rank) >= self._no_room_for or record.name in self._no_room_for_extras:
            return None
        place = self._places.claim(record.name, record.rank, record.extras_bytes)
        if place is not None:
            return place
        candidates = (self.records[name] for name in self._leases if name not in protect)
        idle = {r.name: r.last_used for r in candidates if not r.leases}
        victims = self._places.victims(record.rank, idle, record.extras_bytes)
        if victims is None:
            if record.extras_bytes:
                self._no_room_for_extras.add(record.name)
            else:
                self._no_room_for = padded(record.rank)
            return None
        for name in victims:
            self._evict(self.records[name])
        return self._places.claim(record.name, record.rank, record.extras_bytes)

    def _forget_who_found_no_room(self) -> None:
        self._no_room_for = math.inf
        self._no_room_for_extras.clear()

    def _evict(self, record: AdapterRecord) -> None:
        self._move(record, AdapterState.EVICTING)
        del self._leases[record.name]
        self._pool.clear(self._places.free(record.name).slot)
        self._move(record, AdapterState.COLD)
        self._evictions += 1

    def _fail(self, record: AdapterRecord, reason: str) -> None:
        self._failures += 1
        self._failed.append(record.name)
        log.warning("adapter %s (%s) failed: %s", record.name, record.path, reason)
        record.rank = record.extras_bytes = 0
        record.looked_at = self._clock()
        self._move(record, AdapterState.FAILED, reason)

    def _move(self, record: AdapterRecord, to: AdapterState, reason: str = "") -> None:
        self._by_state[record.state] -= 1
        record.transition(to, self._clock(), reason)
        self._by_state[to] += 1
