# SPDX-License-Identifier: Apache-2.0
"""Compositions of adapters that requests have asked for: each is an entry of its own in the pool and the host cache.

They are transient. One that nobody uses is forgotten when its bytes have gone, when there are too many, or when a part
has been replaced or unloaded. Those that requests hold keep the revisions of their parts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from decimal import Decimal

from multilora_backend.adapters.composing import NOT_A_SUM, composed_version
from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.lifecycle import Lifecycle
from multilora_backend.adapters.polled import Polled
from multilora_backend.adapters.revisions import Revisions
from multilora_backend.adapters.sources import Kind, Source
from multilora_backend.adapters.state import AdapterRecord, AdapterState, Chosen
from multilora_backend.composition import Part, spelled
from multilora_backend.core import COMPOSED
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

MAX_COMPOSITIONS = 256
MAX_TITLE = 200
"""Characters of a composition in logs and error messages."""

Identity = tuple[tuple[str, Decimal], ...]
"""Keys of the parts, in order, and their weights."""


class Compositions:
    """Engine thread only. A lookup costs by the number of parts."""

    def __init__(self, revisions: Revisions, life: Lifecycle) -> None:
        self._revisions = revisions
        self._life = life
        self._known: OrderedDict[Identity, AdapterRecord] = OrderedDict()
        """What has been given back since is still in here, until it is met."""

    def __len__(self) -> int:
        return sum(self._there(record) for record in self._known.values())

    def key(self, parts: Iterable[tuple[AdapterRecord, Decimal]]) -> str:
        """Of the sum of some adapters; "" if nothing is left of it, the adapter's own if it is one with weight 1.

        Raises MultiloraError: too large for the device, too many in use, or FAILED, with the reason.
        """
        weights: dict[AdapterRecord, Decimal] = {}
        for part, weight in parts:  # aliases and versions may lead to the same revision
            weights[part] = weights.get(part, Decimal(0)) + weight
        chosen = tuple(sorted(((p, w) for p, w in weights.items() if w), key=lambda part: part[0].key))
        if not chosen:
            return ""
        if len(chosen) == 1 and chosen[0][1] == 1:
            return chosen[0][0].key
        identity = tuple((part.key, weight) for part, weight in chosen)
        record = self._known.get(identity)
        self._check(chosen)
        if record is None or not self._is(record, chosen):
            self._make_room()
            record = self._known[identity] = self._new(chosen)
        record.rank = record.rank or _rank(chosen)
        if record.state is AdapterState.FAILED and not self._life.revive(record):
            raise MultiloraError(ErrorCode.INTERNAL, f"LoRA {record.title} could not be loaded: {record.reason}")
        return record.key

    def take_in(self, polled: Polled) -> None:
        """Finds successors for holders of compositions that cannot be made any more, and forgets what is unused."""
        for record in polled.stale:
            if not self._there(record) or not record.holds or record.state is not AdapterState.COLD:
                continue
            try:
                successor = self.key([(self._successor(part), weight) for part, weight in record.parts])
            except MultiloraError as error:
                self._life.books.fail(record, error.message, passing=True)
                continue  # which the next poll tells
            if successor != record.key:
                polled.moved.append((record.key, successor))
            elif not any(self._under_way(part) for part, _ in record.parts):
                # Only the device has what was asked for, and nobody will tell of the change before the watcher does.
                self._life.books.fail(record, "the source of a part has another content now", passing=True)
        self._forget_oldest()

    def _new(self, parts: Chosen) -> AdapterRecord:
        record = self._revisions.new(AdapterEntry(COMPOSED, Source(Kind.PARTS, _title(parts))), parts)
        for part, _ in parts:
            part.wholes[record.key] = record
        record.retired = any(part.retired for part, _ in parts)
        record.nbytes = sum(part.nbytes for part, _ in parts)  # about, until it has been made
        if all(part.version for part, _ in parts):
            version = composed_version((part.version, weight) for part, weight in parts)
            self._life.books.set_version(record, version)
        return record

    def _check(self, parts: Chosen) -> None:
        """As far as the parts are known; else it is found when they are read."""
        if any(part.extras_bytes for part, _ in parts):
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"lora_name: {_title(parts)}: {NOT_A_SUM}")
        problem = self._life.residency.pool.too_large(_rank(parts))
        if problem:
            ranks = " + ".join(str(part.rank) for part, _ in parts)
            raise invalid("lora_name", f"{_title(parts)}: its parts have the ranks {ranks}, and {problem}")

    def _make_room(self) -> None:
        """Forgets the one that was not used for longest, if there are too many. Raises MultiloraError if all are."""
        if len(self._known) < MAX_COMPOSITIONS:
            return
        idle = {i: r for i, r in self._known.items() if not self._there(r) or not (r.holds or r.leases)}
        if not idle:
            message = f"lora_name: {MAX_COMPOSITIONS} compositions of adapters are in use already"
            raise MultiloraError(ErrorCode.UNAVAILABLE, message)
        oldest = min(idle, key=lambda identity: idle[identity].last_used or idle[identity].since)
        self._forget(oldest, idle[oldest])

    def _forget_oldest(self) -> None:
        """Looks at one a turn: if nobody holds it and no memory has it, nothing is lost."""
        if not self._known:
            return
        identity, record = next(iter(self._known.items()))
        busy = record.holds or record.leases or record.key in self._life.readings
        gone = record.state in (AdapterState.COLD, AdapterState.FAILED) and record.version not in self._life.host
        waits = record.state is AdapterState.FAILED and self._life.books.clock() < record.retry_at
        if not self._there(record) or (gone and not busy and not waits):
            self._forget(identity, record)
        else:
            self._known.move_to_end(identity)

    def _forget(self, identity: Identity, record: AdapterRecord) -> None:
        del self._known[identity]
        if self._there(record):
            self._revisions.retire(record)

    def _there(self, record: AdapterRecord) -> bool:
        return self._life.books.records.get(record.key) is record

    def _under_way(self, record: AdapterRecord) -> bool:
        return record.state is AdapterState.LOADING or record.key in self._life.readings

    def _is(self, record: AdapterRecord, parts: Chosen) -> bool:
        """A key may stand for another revision by now."""
        return self._there(record) and record.parts == parts

    def _successor(self, part: AdapterRecord) -> AdapterRecord:
        if not part.retired:
            return part
        current = self._revisions.current.get(part.entry.name)
        if current is None:
            reason = f"its part {part.entry.name} was unloaded, and its source has another content now"
            raise MultiloraError(ErrorCode.UNAVAILABLE, reason)
        if current.state is AdapterState.FAILED:
            raise MultiloraError(ErrorCode.INTERNAL, f"its part {part.entry.name}: {current.reason}")
        return current


def _rank(parts: Chosen) -> int:
    """0 while one of them is unknown."""
    ranks = [part.rank for part, _ in parts]
    return sum(ranks) if all(ranks) else 0


def _title(parts: Chosen) -> str:
    title = spelled(Part(part.entry.name, weight) for part, weight in parts)
    return title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 3] + "..."
