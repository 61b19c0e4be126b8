# SPDX-License-Identifier: Apache-2.0
"""The device level: who has a place in the pool, what is on its way there, what can be leased, and who makes room.

Device memory is reserved when an adapter is requested, not when its weights have been read: whoever is requested first
gets the room, and no later request can take it while the weights are on their way.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from multilora_backend.adapters.books import Books
from multilora_backend.adapters.costs import LoadCosts
from multilora_backend.adapters.host import HostCache
from multilora_backend.adapters.layout import AdapterWeights
from multilora_backend.adapters.pins import Pins
from multilora_backend.adapters.pool import DevicePool, Transfer
from multilora_backend.adapters.ranks import Place, padded
from multilora_backend.adapters.room import Clearing, Room
from multilora_backend.adapters.state import AdapterRecord, AdapterState, Lease


@dataclass(frozen=True)
class _OnItsWay:
    transfer: Transfer
    lease: Lease
    nbytes: int
    begun: float


class Residency:
    def __init__(self, pool: DevicePool, host: HostCache, books: Books, costs: LoadCosts) -> None:
        self.pool = pool
        self.pins = Pins(pool)
        self.leases: dict[str, Lease] = {}
        """ACTIVE adapters, by key: all of it is there."""
        self.written = 0
        """Copies begun since the last `take_in`."""
        self._host = host
        self._books = books
        self._costs = costs
        self._transfers: dict[str, _OnItsWay] = {}
        self._places = Room(pool.num_ranks, pool.extras.nbytes)
        self._no_room_for: float = math.inf
        """Ranks that were asked for in vain since there may have been new room: larger requests need not look."""
        self._no_room_for_extras: set[str] = set()
        """Keys with extras that asked in vain since then: it may be the arena that is full, not the ranks."""

    @property
    def transferring(self) -> bool:
        return bool(self._transfers)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Of A and B: taken or reserved, and the budget."""
        per_rank = self.pool.bytes_per_rank
        return (self.pool.num_ranks - self._places.num_free) * per_rank, self.pool.num_ranks * per_rank

    @property
    def extras_nbytes(self) -> int:
        """Of the arena: taken or reserved."""
        return self._places.extras_nbytes

    def place(self, key: str) -> Place | None:
        return self._places.get(key)

    def holds(self, key: str, weights: AdapterWeights) -> bool:
        """Whether its place is one for these weights."""
        return self._places.holds(key, weights.rank, weights.extras_bytes)

    def no_room(self, record: AdapterRecord) -> bool:
        """Whether room for so much was last asked for in vain."""
        return padded(record.rank) >= self._no_room_for or record.key in self._no_room_for_extras

    def look_again(self) -> None:
        """Something was given back, or may be evicted now."""
        self._no_room_for = math.inf
        self._no_room_for_extras.clear()

    def reserve(self, record: AdapterRecord, protect: Collection[str]) -> bool:
        """A place for an adapter of known rank, evicting and moving for it if need be; False if there is none now.

        It becomes FAILED if there will be none either, as pinned adapters are in the way.
        """
        problem = self.pins.in_the_way(record)
        if problem:
            self._books.fail(record, problem, passing=True)
            return False
        if self.no_room(record):
            return False
        if self._claim(record):
            return True
        active = (self._books.records[key] for key in self.leases if key not in protect)
        idle = {r.key: max(r.since, r.last_used or 0.0) for r in active if self._evictable(r)}
        # Usually nothing is idle when somebody waits: then there is nothing to plan, which takes half a millisecond.
        gained = sum(padded(self._books.records[key].rank) for key in idle)
        if self._places.num_free + gained < padded(record.rank):
            self._no_room_for = padded(record.rank)
            return False
        if idle and not record.extras_bytes:
            oldest = min(idle, key=idle.__getitem__)
            if padded(self._books.records[oldest].rank) >= padded(record.rank):  # no plan would be better than this one
                self.evict(self._books.records[oldest])
                return self._claim(record)
        # What is on its way to a place stays there; all others may be moved, leased or not: steps are planned with the
        # pool's tables, which say where they are now.
        room = self._places.clear_for(record.rank, record.extras_bytes, idle, self._transfers)
        if room is None:
            if record.extras_bytes:
                self._no_room_for_extras.add(record.key)
            else:
                self._no_room_for = padded(record.rank)
            return False
        for key in room.evict:
            self.evict(self._books.records[key])
        self._shift(room)
        return self._claim(record)

    def write(self, record: AdapterRecord, weights: AdapterWeights) -> None:
        """Begins to copy a LOADING adapter to its place; it becomes FAILED if the device refuses."""
        place = self._places.get(record.key)
        assert place is not None, f"adapter {record.key} is written without a place"
        self.written += 1
        try:
            extras_start = self._places.extras_start(record.key)
            transfer = self.pool.write(weights, place.slot, place.rank_start, extras_start)
        except RuntimeError as error:  # torch's, for whatever its device or its memory lacks
            self._lost(record, error)
            return
        generation = int(self.pool.generation[place.slot])
        start, rank = place.rank_start, place.rank
        lease = Lease(record.key, weights.version, place.slot, start, rank, generation, weights.invocation)
        self._transfers[record.key] = _OnItsWay(transfer, lease, weights.nbytes, self._books.clock())

    def take_in(self) -> None:
        """Makes ACTIVE what has arrived, or FAILED."""
        self.written = 0
        self.look_again()
        for key, way in list(self._transfers.items()):
            record = self._books.records[key]
            try:
                done = way.transfer.done()
            except RuntimeError as error:  # as above
                self._lost(record, error)
                continue
            if done:
                del self._transfers[key]
                self.leases[key] = way.lease
                self._costs.copied(way.nbytes, self._books.clock() - way.begun)
                self._books.loaded(record)

    def free(self, record: AdapterRecord) -> None:
        """Gives its place back, if it has one."""
        self.leases.pop(record.key, None)
        self._transfers.pop(record.key, None)
        if self._places.get(record.key) is not None:
            self.pool.clear(self._places.free(record.key).slot)
        self.look_again()

    def evict(self, record: AdapterRecord) -> None:
        self._books.move(record, AdapterState.EVICTING)
        self.free(record)
        self._books.move(record, AdapterState.COLD)
        self._books.evictions += 1

    def give_up(self, record: AdapterRecord) -> bool:
        """Evicts it if it is ACTIVE and may go; see `AdapterManager.give_up`."""
        if record.key not in self.leases or not self._evictable(record):
            return False
        self.evict(record)
        return True

    def _claim(self, record: AdapterRecord) -> bool:
        return self._places.claim(record.key, record.rank, record.extras_bytes) is not None

    def _shift(self, room: Clearing) -> None:
        # Who has only reserved its place has nothing to be copied.
        for shift in room.shifts:
            place = self._places.move(shift.name, shift.start)
            if shift.name in self.leases:
                self.pool.move(place.slot, place.rank_start)
        for shift in room.extras_shifts:
            begin = self._places.extras_start(shift.name)
            place = self._places.move_extras(shift.name, shift.start)
            if shift.name in self.leases:
                size = self._books.records[shift.name].extras_bytes
                self.pool.extras.move(place.slot, begin, self._places.extras_start(shift.name), size)

    def _lost(self, record: AdapterRecord, error: RuntimeError) -> None:
        """It says nothing about the adapter, so it may be asked for again."""
        self.free(record)
        self._books.fail(record, f"cannot be copied to the device: {error}", passing=True)

    def _evictable(self, record: AdapterRecord) -> bool:
        return not record.leases and not record.pinned and not self._last_copy(record)

    def _last_copy(self, record: AdapterRecord) -> bool:
        """Of what is retired the source may have changed: whoever is to run with it needs this copy.

        Compositions do not: they are made of copies on the host or of the source, and may need the room for that.
        """
        if not record.retired or record.version in self._host:
            return False
        return record.holds > sum(whole.holds > 0 for whole in record.wholes.values())
