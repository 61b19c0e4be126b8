# SPDX-License-Identifier: Apache-2.0
"""Every revision that is known, the one place where states change, and what is counted when they do."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from multilora_backend.adapters.jobs import Outcome
from multilora_backend.adapters.state import AdapterRecord, AdapterState

log = logging.getLogger(__name__)

RECHECK_S = 1.0
"""What was refused for its content is looked at again this often at most, and only if somebody asks for it."""
RETRY_S, MAX_RETRY_S = 1.0, 60.0
"""What failed for a cause that may pass is tried again after this long, doubled with every failure in a row."""


class Happened(Enum):
    CHECKED = "checked"
    """Its config and header are fine."""
    READ = "read"
    """Its weights have been read; the outcome has them."""
    CHANGED = "changed"
    """Its source holds another content by now, which the outcome has; its own could not be read."""
    STALE = "stale"
    """A composition: the source of a part has another content by now, and the part's own could not be read."""
    FAILED = "failed"


@dataclass(frozen=True)
class Event:
    what: Happened
    record: AdapterRecord
    outcome: Outcome | None = None


class Books:
    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.records: dict[str, AdapterRecord] = {}
        self.keys_of: defaultdict[str, set[str]] = defaultdict(set)
        """Version -> keys of the records that have it."""
        self.by_state = Counter(dict.fromkeys(AdapterState, 0))
        self.loads = self.failures = self.evictions = 0
        self.load_seconds: list[float] = []
        """Since they were last taken."""
        self.events: list[Event] = []
        """Likewise."""

    def add(self, record: AdapterRecord) -> None:
        record.since = self.clock()
        self.records[record.key] = record
        self.by_state[record.state] += 1
        if record.version:
            self.keys_of[record.version].add(record.key)

    def forget(self, record: AdapterRecord) -> None:
        self.set_version(record, "")
        del self.records[record.key]
        self.by_state[record.state] -= 1

    def set_version(self, record: AdapterRecord, version: str) -> None:
        if record.version:
            self.keys_of[record.version].discard(record.key)
            if not self.keys_of[record.version]:
                del self.keys_of[record.version]
        record.version = version
        if version:
            self.keys_of[version].add(record.key)

    def move(self, record: AdapterRecord, to: AdapterState, reason: str = "") -> None:
        self.by_state[record.state] -= 1
        record.transition(to, self.clock(), reason)
        self.by_state[to] += 1

    def loaded(self, record: AdapterRecord) -> None:
        """From LOADING to ACTIVE."""
        record.load_seconds = self.clock() - record.since
        record.loads += 1
        record.attempts = 0
        self.loads += 1
        self.load_seconds.append(record.load_seconds)
        self.move(record, AdapterState.ACTIVE)
        if record.no_effect:
            log.warning("adapter %s: has no effect, all its deltas are zero", record.key)

    def fail(self, record: AdapterRecord, reason: str, passing: bool) -> None:
        """`passing`: the cause lies outside of its content, so that it is worth trying again. Its version stays."""
        log.warning("adapter %s (%s) failed: %s", record.key, record.entry.source.text, reason)
        self.failures += 1
        record.attempts += 1
        wait = min(RETRY_S * 2.0 ** min(record.attempts - 1, 16), MAX_RETRY_S) if passing else RECHECK_S
        record.passing, record.retry_at = passing, self.clock() + wait
        if not record.version:
            record.rank = record.extras_bytes = 0
        self.move(record, AdapterState.FAILED, reason)
        self.events.append(Event(Happened.FAILED, record))

    def take_events(self) -> list[Event]:
        events, self.events = self.events, []
        return events
