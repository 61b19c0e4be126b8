# SPDX-License-Identifier: Apache-2.0
"""The revisions of each name: which one is current, which one may become it, and which ones are being given back.

A new revision of a name whose current one serves is a candidate first: it takes over when it has been found fine. What
was replaced or unloaded is retired: it serves those that hold it, then its bytes are given back.
"""

from __future__ import annotations

import logging
from collections import Counter

from multilora_backend.adapters.books import Event, Happened
from multilora_backend.adapters.entry import AdapterEntry, Origin
from multilora_backend.adapters.jobs import Purpose
from multilora_backend.adapters.lifecycle import Lifecycle
from multilora_backend.adapters.polled import Polled
from multilora_backend.adapters.state import AdapterRecord, AdapterState, Chosen

log = logging.getLogger(__name__)


class Revisions:
    def __init__(self, life: Lifecycle) -> None:
        self.current: dict[str, AdapterRecord] = {}
        self.arrivals = Counter({"device": 0, "host": 0, "disk": 0})
        """Sequences, by where their adapter was when they came."""
        self._life = life
        self._all: dict[str, list[AdapterRecord]] = {}
        """By name, the oldest first."""
        self._candidates: dict[str, AdapterRecord] = {}
        self._wanted: dict[str, AdapterRecord] = {}
        """By key: an operator wants it on the device, and it is not there yet."""
        self._retrying: dict[str, AdapterRecord] = {}
        """Candidates that could not be read for a cause that may pass, and that nobody but we will try again."""
        self._ending: dict[str, AdapterRecord] = {}
        """Nobody will ask for it again, but something of it is under way."""

    def of(self, name: str) -> list[AdapterRecord]:
        """That can be addressed or still serve: without a candidate."""
        candidate = self._candidates.get(name)
        return [record for record in self._all.get(name, ()) if record is not candidate]

    def candidate(self, name: str) -> AdapterRecord | None:
        return self._candidates.get(name)

    def add(self, entry: AdapterEntry) -> AdapterRecord:
        """A new revision: current if no other one can serve, else a candidate, which replaces an older candidate."""
        record = self.new(entry)
        current = self.current.get(entry.name)
        if current is None or current.state is AdapterState.FAILED or not current.version:
            self.promote(record)
        else:
            self._drop_candidate(entry.name)
            self._candidates[entry.name] = record
        return record

    def new(self, entry: AdapterEntry, parts: Chosen = ()) -> AdapterRecord:
        """One that nobody asks for by its name yet. `parts`: of a composition."""
        records = self._all.setdefault(entry.name, [])
        serial = int(records[-1].key.partition("@")[2] or 1) + 1 if records else 1
        record = AdapterRecord(entry.name if serial == 1 else f"{entry.name}@{serial}", entry, parts)
        records.append(record)
        self._life.books.add(record)
        return record

    def restore(self, entry: AdapterEntry, version: str) -> AdapterRecord:
        """A retired revision of an earlier run of the server; somebody must hold it."""
        record = self.new(entry)
        self._life.books.set_version(record, version)
        record.retired = True
        return record

    def examine(self, record: AdapterRecord, weights: bool) -> None:
        """Checks a revision, or reads it to the host."""
        if weights:
            self._life.prefetch(record, asked=True)
        else:
            self._life.readings.submit(record, Purpose.CHECK)

    def promote(self, record: AdapterRecord) -> None:
        """From now on requests for the name get this revision; those under way keep theirs."""
        name = record.entry.name
        if self._candidates.get(name) is record:
            del self._candidates[name]
        before = self.current.get(name)
        self.current[name] = record
        if before is None:
            return
        pinned, wanted = before.pinned, self._wanted.pop(before.key, None)
        self.retire(before)
        if pinned:
            self.pin(record)
        elif wanted is not None:
            self.want(record)

    def retire(self, record: AdapterRecord) -> None:
        record.retired = True
        self._retrying.pop(record.key, None)
        self._life.residency.pins.remove(record)
        self._wanted.pop(record.key, None)
        self._life.keep(record)
        for whole in list(record.wholes.values()):
            self.retire(whole)
        self.settle(record)

    def unload(self, name: str) -> None:
        self._drop_candidate(name)
        current = self.current.pop(name, None)
        if current is not None:
            self.retire(current)

    def hold(self, record: AdapterRecord) -> None:
        record.holds += 1
        self._life.keep(record)
        for part, _ in record.parts if record.holds == 1 else ():
            self.hold(part)

    def drop(self, record: AdapterRecord) -> None:
        """Raises RuntimeError if it is not held."""
        if record.holds < 1:
            raise RuntimeError(f"adapter {record.key}: a hold is given back that is not held")
        record.holds -= 1
        self.settle(record)
        for part, _ in record.parts if not record.holds else ():
            self.drop(part)

    def settle(self, record: AdapterRecord) -> None:
        """Gives a revision back that nobody needs any more, as soon as nothing of it is under way."""
        if not record.ends:
            return
        if not self._life.dispose(record):
            self._ending[record.key] = record
            return
        self._ending.pop(record.key, None)
        for part, _ in record.parts:
            part.wholes.pop(record.key, None)
        records = self._all[record.entry.name]
        records.remove(record)
        if not records:
            del self._all[record.entry.name]

    def want(self, record: AdapterRecord) -> None:
        """Brings it to the device as soon as there is room."""
        self._wanted[record.key] = record

    def pin(self, record: AdapterRecord) -> None:
        """Raises nothing: what does not fit is noted, as nobody waits for an answer."""
        problem = self._life.residency.pins.excess(record)
        if problem:
            record.note = problem
            log.warning("adapter %s: %s", record.key, problem)
            self._life.residency.pins.remove(record)
        else:
            self._life.residency.pins.add(record)
            self.want(record)

    def poll(self) -> Polled:
        polled = Polled()
        for event in self._life.poll():
            record = event.record
            if record.ends:
                continue
            match event.what:
                case Happened.CHECKED | Happened.READ:
                    self._found_fine(record)
                    polled.read += [record] if record.version else []
                    polled.looked_at += [record.key] if record.holds else []
                case Happened.CHANGED:
                    self._changed(record, event, polled)
                case Happened.STALE:
                    polled.stale.append(record)
                case Happened.FAILED:
                    self._failed(record, polled)
        for record in list(self._wanted.values()):
            self._bring(record)
        for record in list(self._retrying.values()):
            if self._life.revive(record):
                del self._retrying[record.key]
                self.examine(record, weights=False)
        for record in list(self._ending.values()):
            self.settle(record)
        return polled

    def _found_fine(self, record: AdapterRecord) -> None:
        name = record.entry.name
        if self._candidates.get(name) is record:
            current = self.current[name]
            if record.version and record.version == current.version:
                # The files were touched and say what they said.
                current.entry, current.fingerprint = record.entry, record.fingerprint
                self._drop_candidate(name)
                return
            current.note = ""
            self.promote(record)
        if record.pinned:
            self.pin(record)  # its rank is known now

    def _changed(self, record: AdapterRecord, event: Event, polled: Polled) -> None:
        """A source was changed before this revision could be read (again): its content is the next revision."""
        successor = self.current.get(record.entry.name)
        outcome = event.outcome
        assert outcome is not None
        assert outcome.weights is not None
        if successor is record:
            weights, found, wanted = outcome.weights, outcome.weights.version, record.entry.version
            reason = self._life.residency.pool.too_large(weights.rank, weights.extras_bytes)
            if not found.startswith(wanted):
                reason = f"version {wanted} was asked for, and the source has {found} now"
            if reason:
                record.refused = outcome.fingerprint
                self._life.books.fail(record, reason, passing=False)
                return  # which the next poll tells
            successor = self._candidates.get(record.entry.name)
            if successor is None:
                successor = self.new(record.entry)
                self._life.learn(successor, outcome)
                polled.read.append(successor)
            self.promote(successor)
        if successor is None:
            reason = "it was unloaded, and its source has another content now"
            self._life.books.fail(record, reason, passing=False)
        elif record.holds and record.state is AdapterState.COLD:  # else it may be gone already, or serves
            polled.moved.append((record.key, successor.key))

    def _failed(self, record: AdapterRecord, polled: Polled) -> None:
        name = record.entry.name
        current = self.current.get(name)
        if self._candidates.get(name) is record:
            assert current is not None
            current.note = f"a new revision from {record.entry.source.text} was refused: {record.reason}"
            if record.passing and record.entry.origin is Origin.CONFIG:
                self._retrying[record.key] = record
            else:
                self._drop_candidate(name)
        elif record.retired and current is not None and current.state is not AdapterState.FAILED:
            polled.moved.append((record.key, current.key))
        else:
            polled.failed.append(record.key)

    def _drop_candidate(self, name: str) -> None:
        if (candidate := self._candidates.pop(name, None)) is not None:
            self.retire(candidate)

    def _bring(self, record: AdapterRecord) -> None:
        if record.state is AdapterState.FAILED and record.pinned:
            self._life.revive(record)
        elif record.state in (AdapterState.ACTIVE, AdapterState.FAILED):
            del self._wanted[record.key]
        else:
            self._life.request(record)
