# SPDX-License-Identifier: Apache-2.0
"""Between the books and the state file: what is written down, when, and how it is taken up again at the next start."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from multilora_backend.adapters.books import Books
from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.state import AdapterRecord, Fingerprint
from multilora_backend.adapters.statefile import Saved, SavedEntry, StateFile

if TYPE_CHECKING:
    from multilora_backend.adapters.registry import Registry

log = logging.getLogger(__name__)

VERSIONS_S = 1.0
"""So long new versions are collected before they are written: after a start there are many."""


class Remembered:
    """Versions of sources, so that `name@version` is known before a source is read again; and when to write."""

    def __init__(self, file: StateFile | None, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._due = math.inf
        self.saved = file.read() if file is not None else Saved()
        self._versions: dict[str, tuple[Fingerprint, str]] = dict(self.saved.versions)
        self.unusable: list[SavedEntry] = []
        """Saved adapters whose source is not allowed any more: kept in the file, in case that is a mistake."""

    def changed(self) -> None:
        """A command has changed something."""
        self._due = self._clock()

    def read(self, record: AdapterRecord) -> None:
        """A revision's version became known."""
        text = record.entry.source.text
        if self._file is None or record.fingerprint is None:
            return
        if self._versions.get(text) != (record.fingerprint, record.version):
            self._versions[text] = record.fingerprint, record.version
            self._due = min(self._due, self._clock() + VERSIONS_S)

    def recall(self, record: AdapterRecord, books: Books) -> None:
        """A new record of a source that looks as it did when it was read has the version that it had."""
        known = self._versions.get(record.entry.source.text)
        if known is not None and record.entry.fingerprint in (None, known[0]) and not record.version:
            record.fingerprint = known[0]
            books.set_version(record, known[1])

    def forget(self, entry: AdapterEntry) -> None:
        self._versions.pop(entry.source.text, None)

    def save(self, registry: Registry, held: Mapping[str, AdapterRecord], at_once: bool = False) -> None:
        """Hands the state to the file's thread if that is due. `held`: revisions by the aliases that name them."""
        if self._file is None or (self._clock() < self._due and not (at_once and self._due < math.inf)):
            return
        self._due = math.inf
        old = {record.key: record for record in held.values() if record.retired and record.version}
        saved = Saved(
            adapters=[*map(_saved, registry.loaded.values()), *self.unusable],
            revisions=[_saved(record.entry, record.version) for record in old.values()],
            aliases=dict(registry.aliases),
            pins=dict(registry.pins),
            unloaded=sorted(registry.unloaded),
            versions=dict(self._versions),
        )
        self._file.put(saved)

    @property
    def written(self) -> bool:
        """What commands have changed is in the file, as far as that can be written."""
        return self._file is None or (self._clock() < self._due and self._file.idle)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _saved(entry: AdapterEntry, version: str = "") -> SavedEntry:
    source = entry.source
    return SavedEntry(entry.name, source.text, source.sha256, entry.tenants, version or entry.version)


def in_order(aliases: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Aliases of aliases after those that they lead to."""

    def depth(alias: str) -> int:
        count, seen = 0, {alias}
        while (alias := aliases.get(alias, "")) and alias not in seen:
            seen.add(alias)
            count += 1
        return count

    return sorted(aliases.items(), key=lambda item: depth(item[0]))
