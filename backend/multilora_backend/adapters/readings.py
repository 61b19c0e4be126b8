# SPDX-License-Identifier: Apache-2.0
"""What loader threads are doing for whom."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from multilora_backend.adapters.jobs import Job, Outcome, Parts, Purpose
from multilora_backend.adapters.layout import AdapterWeights
from multilora_backend.adapters.loader import Loader
from multilora_backend.adapters.state import AdapterRecord


class Readings:
    """Finds the record of each outcome by its job, so that a key that is used again gets nothing of its predecessor."""

    def __init__(self, loader: Loader, max_weights: int) -> None:
        """`max_weights`: weights being read at a time; more would only fix an order that may change."""
        self._loader = loader
        self._max_weights = max_weights
        self._jobs: dict[Job, AdapterRecord] = {}
        self._protect: dict[str, frozenset[str]] = {}
        """Whose weights are being read, and what they may not evict."""
        self._reads: dict[str, Job] = {}
        """Their jobs, by key."""
        self._local = 0
        """How many of them are read from this machine. Downloads have threads of their own and are not waited for."""

    def __contains__(self, key: object) -> bool:
        """Whether a record's weights are being read."""
        return key in self._protect

    @property
    def full(self) -> bool:
        return self._local >= self._max_weights

    @property
    def ahead(self) -> float:
        """What comes before one more, in loads by the pace of one thread."""
        return self._local / max(self._max_weights // 2, 1)

    def submit(
        self,
        record: AdapterRecord,
        purpose: Purpose,
        cached: AdapterWeights | None = None,
        frozen: bool = False,
        parts: Parts = (),
    ) -> None:
        job = Job(record.key, record.entry.source, purpose, record.fingerprint, cached, frozen, parts)
        if job.weights:
            self._protect[record.key] = frozenset()
            self._reads[record.key] = job
            self._local += job.is_local
        self._jobs[job] = record
        self._loader.submit(job)

    def hurry(self, key: str) -> None:
        """Somebody waits for what is being read, for whatever it was begun."""
        self._loader.hurry(self._reads[key])

    def protect(self, key: str, keys: Collection[str]) -> None:
        """What may not be evicted for a record that is being read."""
        self._protect[key] = frozenset(keys)

    def finished(self) -> Iterator[tuple[AdapterRecord, Outcome, frozenset[str]]]:
        """What ended since the last call, and what may not be evicted for it."""
        for outcome in self._loader.finished():
            record = self._jobs.pop(outcome.job)
            protect: frozenset[str] = frozenset()
            if outcome.job.weights:
                protect = self._protect.pop(record.key, protect)
                self._reads.pop(record.key, None)
                self._local -= outcome.job.is_local
            yield record, outcome, protect
