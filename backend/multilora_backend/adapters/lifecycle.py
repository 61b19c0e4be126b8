# SPDX-License-Identifier: Apache-2.0
"""From COLD to the device and back, by revision: who is read, checked, copied, retried and given back, and when.

Names, versions and aliases are the manager's business. Engine thread only; nothing here blocks, and nothing goes
through all records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from multilora_backend.adapters.books import RECHECK_S, Books, Event, Happened
from multilora_backend.adapters.costs import LoadCosts
from multilora_backend.adapters.entry import Origin
from multilora_backend.adapters.host import HostCache
from multilora_backend.adapters.jobs import Outcome, Purpose
from multilora_backend.adapters.layout import AdapterWeights
from multilora_backend.adapters.parts import jobs_of_parts, take_in_parts, unexpected
from multilora_backend.adapters.pool import DevicePool
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.readings import Readings
from multilora_backend.adapters.residency import Residency
from multilora_backend.adapters.state import AdapterRecord, AdapterState, AdapterStats

MAX_WRITES = 4
"""Copies from the host begun between two polls: each costs the step loop half a millisecond."""


class Lifecycle:
    def __init__(
        self, pool: DevicePool, host: HostCache, readings: Readings, clock: Callable[[], float], watched: bool
    ) -> None:
        """`watched`: changes of configured adapters are told, so their copies on the host are right without a look."""
        self._costs = LoadCosts.unmeasured()
        self.books = Books(clock)
        self.host = host
        self.readings = readings
        self.residency = Residency(pool, host, self.books, self._costs)
        self._watched = watched

    def request(self, record: AdapterRecord, protect: Collection[str] = ()) -> AdapterState:
        """See `AdapterManager.request`."""
        if record.state is not AdapterState.COLD:
            return record.state
        reading = record.key in self.readings
        cached = None if reading or not record.version else self.host.get(record.version)
        at_once = cached is not None and record.rank > 0 and self._trusts(record)
        if not reading and (self.residency.written >= MAX_WRITES if at_once else self.readings.full):
            return record.state
        # Before an adapter is looked at its rank is unknown: room is then found when it has been read.
        if record.rank and not self.residency.reserve(record, protect):
            return record.state
        self.books.move(record, AdapterState.LOADING)
        if at_once and cached is not None:
            self.residency.write(record, cached)
            return record.state
        if reading:  # as a prefetch, say, which all that somebody waits for would overtake
            self.readings.hurry(record.key)
        else:
            self._submit(record, Purpose.DEVICE, cached)
        self.readings.protect(record.key, protect)
        return record.state

    def prefetch(self, record: AdapterRecord, asked: bool = False) -> None:
        """Reads the weights to the host, if they are not there. `asked`: also if much is being read already."""
        idle = record.state is AdapterState.COLD and record.key not in self.readings
        if idle and record.version not in self.host and (asked or not self.readings.full):
            self._submit(record, Purpose.HOST)

    def waits_for_room(self, record: AdapterRecord) -> bool:
        return record.state is AdapterState.COLD and record.rank > 0 and self.residency.no_room(record)

    def load_cost_s(self, record: AdapterRecord) -> float:
        if record.state is AdapterState.ACTIVE:
            return 0.0
        if record.state is AdapterState.FAILED:
            return math.inf
        cost = self._costs.seconds(record.nbytes, record.version in self.host, self.readings.ahead)
        if record.state is AdapterState.LOADING:
            return max(cost - (self.books.clock() - record.since), 0.0)
        return cost

    def level(self, record: AdapterRecord) -> str:
        """The fastest that has all of it: "device", "host" or "disk"."""
        if record.state is AdapterState.ACTIVE:
            return "device"
        return "host" if record.version in self.host else "disk"

    def revive(self, record: AdapterRecord, at_once: bool = False) -> bool:
        """Whether a FAILED record can be asked for again. If its content is to blame, a thread looks at the source."""
        if not at_once:
            if self.books.clock() < record.retry_at:
                return False
            if not record.passing:
                record.retry_at = self.books.clock() + RECHECK_S
                self.readings.submit(record, Purpose.LOOK)
                return False
        self.books.move(record, AdapterState.COLD)
        return True

    def keep(self, record: AdapterRecord) -> None:
        """What is retired and still held may not lose its last copy: its source may have changed."""
        if record.retired and record.holds and not record.kept:
            record.kept = self.host.hold(record.version)

    def dispose(self, record: AdapterRecord) -> bool:
        """Gives all that a record has back and forgets it; False while something of it is under way."""
        if record.key in self.readings or record.state is AdapterState.LOADING:
            return False
        if record.state is AdapterState.ACTIVE:
            self.residency.evict(record)
        self.residency.pins.remove(record)
        if record.kept:
            self.host.drop(record.version)
        version = record.version
        self.books.forget(record)
        if version and version not in self.books.keys_of:
            self.host.remove(version)
        return True

    def poll(self) -> list[Event]:
        """Takes in what has been read and what has arrived; what happened, in order."""
        self.residency.look_again()
        for record, outcome, protect in self.readings.finished():
            if self.books.records.get(record.key) is not record:
                continue
            match outcome.job.purpose:
                case Purpose.CHECK:
                    self._checked(record, outcome)
                case Purpose.LOOK:
                    if record.state is AdapterState.FAILED and outcome.fingerprint != record.refused:
                        self.books.move(record, AdapterState.COLD)
                case _:
                    if not record.parts or take_in_parts(self, record, outcome):
                        self._read(record, outcome, protect)
        self.residency.take_in()
        return self.books.take_events()

    def learn(self, record: AdapterRecord, outcome: Outcome) -> None:
        """Takes down what was read, and keeps the weights on the host."""
        weights = outcome.weights
        assert weights is not None
        self.books.set_version(record, weights.version)
        record.rank, record.nbytes, record.no_effect = weights.rank, weights.nbytes, weights.no_effect
        record.extras_bytes = weights.extras_bytes
        record.vocabulary = 0 if weights.extras is None else weights.extras.vocabulary
        record.tokens = weights.tokens
        record.fingerprint, record.attempts = outcome.fingerprint, 0
        if outcome.seconds:
            self._costs.read(weights.nbytes, outcome.seconds)
        self.host.put(weights, self._costs.seconds(weights.nbytes, in_host=False))
        self.keep(record)

    def stats(self, arrivals: dict[str, int]) -> AdapterStats:
        """Costs by what is in memory, never by what is registered."""
        books, leases, pool = self.books, self.residency.leases, self.residency.pool
        seconds, books.load_seconds = books.load_seconds, []
        keys = [key for version in self.host for key in books.keys_of.get(version, ()) if key not in leases]
        ranks = sum(padded(lease.rank) for lease in leases.values())
        residents = {key: ("host", books.records[key].rank, books.records[key].pinned) for key in keys}
        residents |= {key: ("device", lease.rank, books.records[key].pinned) for key, lease in leases.items()}
        return AdapterStats(
            by_state={state.value: count for state, count in books.by_state.items()},
            loads_total=books.loads,
            load_failures_total=books.failures,
            evictions_total=books.evictions,
            load_seconds=seconds,
            arrivals=dict(arrivals),
            residents=residents,
            max_resident=pool.num_ranks * len(leases) // ranks if ranks else pool.num_slots,
            bytes={"device": self.residency.nbytes, "host": (self.host.nbytes, self.host.budget_bytes)},
        )

    def _submit(self, record: AdapterRecord, purpose: Purpose, cached: AdapterWeights | None = None) -> None:
        """`cached`: what the host has of it."""
        parts = jobs_of_parts(record, purpose, self.host, self._trusts)
        self.readings.submit(record, purpose, cached, cached is not None and self._trusts(record), parts)

    def _checked(self, record: AdapterRecord, outcome: Outcome) -> None:
        """A check that ends after somebody has read the adapter, or has begun to, says nothing new."""
        if record.state is not AdapterState.COLD or record.nbytes or record.key in self.readings:
            return
        if record.version and outcome.fingerprint != record.fingerprint and not record.holds:
            self.books.set_version(record, "")  # which an earlier run of the server had found there
        record.fingerprint = outcome.fingerprint
        if outcome.plan is not None:
            plan = outcome.plan
            record.rank, record.extras_bytes = plan.rank, plan.extras_bytes
            record.vocabulary, record.tokens = plan.vocabulary, plan.tokens
        reason = outcome.reason or self.residency.pool.too_large(record.rank, record.extras_bytes)
        if reason:
            self._refuse(record, reason, outcome)
        else:
            self.books.events.append(Event(Happened.CHECKED, record, outcome))

    def _read(self, record: AdapterRecord, outcome: Outcome, protect: frozenset[str]) -> None:
        weights, wanted = outcome.weights, record.state is AdapterState.LOADING
        if weights is not None and record.version not in ("", weights.version):
            self.residency.free(record)
            if wanted:
                self.books.move(record, AdapterState.COLD)
            self.books.events.append(Event(Happened.CHANGED, record, outcome))
            return
        reason = outcome.reason
        if weights is not None:
            reason = self.residency.pool.too_large(weights.rank, weights.extras_bytes)
            reason = reason or unexpected(record.entry.version, weights.version)
        if weights is None or reason:
            self.residency.free(record)
            self._refuse(record, reason, outcome)
            return
        self.learn(record, outcome)
        self.books.events.append(Event(Happened.READ, record, outcome))
        if not wanted:
            return
        place = self.residency.place(record.key)
        if place is not None and not self.residency.holds(record.key, weights):
            self.residency.free(record)
            place = None
        if place is not None or self.residency.reserve(record, protect):
            self.residency.write(record, weights)
        elif record.state is AdapterState.LOADING:
            self.books.move(record, AdapterState.COLD)

    def _refuse(self, record: AdapterRecord, reason: str, outcome: Outcome) -> None:
        record.refused = outcome.fingerprint
        self.books.fail(record, reason, passing=outcome.fingerprint is None)

    def _trusts(self, record: AdapterRecord) -> bool:
        """Whether its copy on the host is right without a look at the source."""
        entry = record.entry
        if record.parts:
            return all(self._trusts(part) for part, _ in record.parts)
        return record.retired or self._watched or entry.origin is Origin.ADMIN or not entry.source.is_local
