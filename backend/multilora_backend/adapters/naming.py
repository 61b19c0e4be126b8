# SPDX-License-Identifier: Apache-2.0
"""From names to revisions: which one is meant, what there is to tell of it, and what an entry makes of it."""

from __future__ import annotations

from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.info import adapter_info
from multilora_backend.adapters.lifecycle import Lifecycle
from multilora_backend.adapters.registry import Registry
from multilora_backend.adapters.remembered import Remembered
from multilora_backend.adapters.revisions import Revisions
from multilora_backend.adapters.state import AdapterRecord, AdapterState
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.protocol import AdapterInfo


class Naming:
    """The ground that `AdapterManager` and its commands stand on."""

    def __init__(self, life: Lifecycle, remembered: Remembered, enabled: bool) -> None:
        self.registry = Registry()
        self.revisions = Revisions(life)
        self._life = life
        self._remembered = remembered
        self._enabled = enabled
        self._alias_holds: dict[str, AdapterRecord] = {}
        """Alias -> the revision whose version it names."""

    def show(self, name: str) -> AdapterInfo:
        """Of a name, an alias or `name@version`. Raises MultiloraError if it is unknown."""
        self._require_enabled()
        record = self._find(*self.registry.follow(name))
        name = record.entry.name
        pending = self.revisions.candidate(name) is not None
        return adapter_info(record, self.revisions.of(name), self._life, self.registry, pending)

    def names(self, prefix: str = "", state: str = "") -> list[str]:
        """Sorted. Goes through all of them; `state` is that of the current revision."""
        names = sorted(entry.name for entry in self.registry.entries() if entry.name.startswith(prefix))
        return [name for name in names if state in ("", self.revisions.current[name].state.value)]

    def list(self) -> list[AdapterInfo]:
        """Current revisions, by name: 10 us each, so with thousands rather take some of `names` and `show` them."""
        return [self.show(name) for name in self.names()]

    def draining(self, name: str) -> bool:
        """Unloaded, and not all of its bytes have been given back."""
        return name not in self.registry and bool(self.revisions.of(name))

    def _put(self, entry: AdapterEntry, asked: bool = False) -> None:
        """Registers an entry and sees to its revision. `asked`: by a command, so that the source is read anew."""
        before, current = self.registry.get(entry.name), self.revisions.current.get(entry.name)
        self.registry.put(entry)
        if current is None or before is None or self._another(entry, before, current):
            record = self._new(entry)
            in_memory = current is not None and self._life.level(current) != "disk"
            self._examine(record, asked or in_memory)
            current = self.revisions.current[entry.name]
        else:
            current.entry = entry
            candidate = self.revisions.candidate(entry.name)
            if candidate is not None:
                candidate.entry = entry
            elif asked and current.version and current.state is not AdapterState.FAILED:
                self._examine(self._new(entry), True)
            elif asked:
                self._again(current)
                self._life.prefetch(current, asked=True)
        current.note = ""
        pinned = self.registry.pinned(entry)
        if pinned and not current.pinned:
            self.revisions.pin(current)
        elif current.pinned and not pinned:
            self._life.residency.pins.remove(current)

    def _another(self, entry: AdapterEntry, before: AdapterEntry, current: AdapterRecord) -> bool:
        """Whether an entry may mean another content than the current revision."""
        if (entry.source, entry.version) != (before.source, before.version):
            return True
        read = current.refused if current.state is AdapterState.FAILED else current.fingerprint
        return entry.fingerprint not in (before.fingerprint, read)

    def _new(self, entry: AdapterEntry) -> AdapterRecord:
        record = self.revisions.add(entry)
        if self.revisions.current[entry.name] is record:
            self._remembered.recall(record, self._life.books)
        return record

    def _examine(self, record: AdapterRecord, weights: bool) -> None:
        if self._enabled:
            self.revisions.examine(record, weights)

    def _again(self, record: AdapterRecord) -> None:
        """A FAILED revision is tried again at once, since an operator asks for it."""
        record.note = ""
        if record.state is AdapterState.FAILED:
            self._life.revive(record, at_once=True)

    def _forget(self, entry: AdapterEntry) -> None:
        for alias in self.registry.leading_to(entry.name):
            held = self._alias_holds.pop(alias, None)
            if held is not None:
                self.revisions.drop(held)
        self.registry.forget(entry.name)
        self.revisions.unload(entry.name)
        self._remembered.forget(entry)

    def _current(self, name: str) -> AdapterRecord:
        """What requests for a name get: that alone can be pinned or preloaded. Raises for a version that is not it."""
        self._require_enabled()
        record = self._find(*self.registry.follow(name))
        if record.retired:
            raise invalid("name", f"{name!r} is not the current revision of {record.entry.name!r}")
        return record

    def _find(self, name: str, version: str) -> AdapterRecord:
        """Raises MultiloraError if the name has no such version, or several."""
        current = self.revisions.current[name]
        if not version:
            return current
        records = self.revisions.of(name)
        found = {record.version: record for record in records if record.version.startswith(version)}
        if current.version in found:
            found[current.version] = current
        if len(found) == 1:
            return next(iter(found.values()))
        known = ", ".join(sorted({record.version for record in records if record.version})) or "none"
        what = "is the beginning of several versions" if found else "is no version that is known"
        unread = "" if current.version else "; its current content has not been read yet"
        raise MultiloraError(ErrorCode.INVALID_ARG, f"LoRA {name}@{version} {what}; known: {known}{unread}")

    def _require_enabled(self) -> None:
        if not self._enabled:
            raise MultiloraError(ErrorCode.INVALID_ARG, "LoRA feature is not enabled.")
