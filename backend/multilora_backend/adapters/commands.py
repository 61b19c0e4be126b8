# SPDX-License-Identifier: Apache-2.0
"""What operators do with names: by commands, and by what they write into the configured folder or file.

Every command is idempotent, and either does all that it says or raises MultiloraError and changes nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from multilora_backend.adapters.entry import AdapterEntry, Origin
from multilora_backend.adapters.lifecycle import Lifecycle
from multilora_backend.adapters.naming import Naming
from multilora_backend.adapters.registry import split_version
from multilora_backend.adapters.remembered import Remembered, in_order
from multilora_backend.adapters.sources import Source
from multilora_backend.errors import MultiloraError, invalid

log = logging.getLogger(__name__)

Admit = Callable[[str], Source]
"""Reads a source that somebody asks for by text. Raises MultiloraError if it is malformed or not allowed."""


class Commands(Naming):
    """The operators' half of `AdapterManager`."""

    def __init__(self, life: Lifecycle, remembered: Remembered, admit: Admit, enabled: bool) -> None:
        super().__init__(life, remembered, enabled)
        self._admit = admit
        self._config: dict[str, AdapterEntry] = {}
        """What the configured source wanted last, also what is refused or unloaded."""

    def load(
        self, name: str, source: str = "", *, version: str = "", pinned: bool = False, tenants: Iterable[str] = ()
    ) -> None:
        """Adds a name, or serves it from what its source has now; `list` and `show` tell what becomes of it.

        Without `source`: what is registered under this name, else the folder of this name among the configured ones.
        With `version`, another content is refused. What serves until now goes on until the new revision is found fine.
        """
        self._require_enabled()
        if version and not re.fullmatch("[0-9a-f]+", version):
            raise invalid("version", f"must be hexadecimal digits, got {version[:80]!r}")
        entry = self.registry.get(name) or self._config.get(name)
        if source or entry is None:
            entry = AdapterEntry(name, self._admit(source or name), Origin.ADMIN, False, tuple(tenants), version)
        elif entry.origin is Origin.ADMIN:
            entry = replace(entry, tenants=tuple(tenants) or entry.tenants, version=version)
        elif tenants or version:
            raise invalid("tenants" if tenants else "version", f"of {name!r} is set where the adapter is configured")
        self.registry.check(entry)
        self.registry.unloaded.discard(name)
        if pinned:
            self.registry.pins[name] = True
        self._put(entry, asked=True)
        self._remembered.changed()

    def unload(self, name: str) -> None:
        """New requests do not find the name from now on; its bytes come back when the last one that has it has ended.

        Raises MultiloraError if it is an alias, or an alias leads to it. A configured adapter stays away until `load`.
        """
        self._require_enabled()
        if name in self.registry.aliases:
            raise invalid("name", f"{name!r} is an alias of {self.registry.aliases[name]!r}, not an adapter")
        entry = self.registry.get(name)
        if entry is None:
            return
        self.registry.remove(name)
        if entry.origin is Origin.CONFIG:
            self.registry.unloaded.add(name)
        self._forget(entry)
        self._remembered.changed()

    def pin(self, name: str) -> None:
        """Brings it to the device, where it stays. Raises MultiloraError that names the bytes if it does not fit."""
        record = self._current(name)
        self._life.residency.pins.check(record)
        self.registry.pins[record.entry.name] = True
        self._again(record)
        self.revisions.pin(record)
        self._remembered.changed()

    def unpin(self, name: str) -> None:
        record = self._current(name)
        self.registry.pins[record.entry.name] = False
        self._life.residency.pins.remove(record)
        self._life.residency.look_again()
        self._remembered.changed()

    def preload(self, name: str) -> None:
        """Brings it to the device as soon as there is room, until then to the host. It stays as long as any other."""
        record = self._current(name)
        record = self.revisions.candidate(record.entry.name) or record
        self._again(record)
        self.revisions.want(record)
        self._life.prefetch(record, asked=True)

    @property
    def written(self) -> bool:
        """Whether a restart would know what commands have changed, as far as the state file can be written."""
        return self._remembered.written

    def alias(self, alias: str, target: str) -> None:
        """Sets or moves an alias of a name, of another alias, or of `name@version`, which then is kept servable."""
        self._require_enabled()
        name, version = split_version(target, "target")
        record = None
        if version and name in self.registry:
            record = self._find(name, version)
            target = f"{name}@{record.version or version}"
        self.registry.alias(alias, target)
        before = self._alias_holds.pop(alias, None)
        if record is not None:
            self.revisions.hold(record)
            self._alias_holds[alias] = record
        if before is not None:
            self.revisions.drop(before)
        self._remembered.changed()

    def unalias(self, alias: str) -> None:
        """An alias that does not exist is gone already."""
        self.registry.unalias(alias)
        record = self._alias_holds.pop(alias, None)
        if record is not None:
            self.revisions.drop(record)
        self._remembered.changed()

    def reconcile(self, entries: Iterable[AdapterEntry]) -> dict[str, str]:
        """Takes over what the configured source wants now: adds, changes, removes. What commands loaded stays.

        Returns names that could not be taken over, with the reason; they are tried again the next time.
        """
        refused: dict[str, str] = {}
        wanted = {entry.name: entry for entry in entries}
        for name, entry in wanted.items():
            before = self.registry.get(name)
            if entry is before or entry == before or name in self.registry.unloaded:
                continue
            try:
                self._put(entry)
            except MultiloraError as error:
                refused[name] = error.message
                log.error("adapters: %s is not taken over: %s", name, error.message)
        for name in self._config.keys() - wanted.keys():
            gone = self.registry.get(name)
            if gone is not None and gone.origin is Origin.CONFIG:
                self._forget(gone)
            if name in self.registry.unloaded:
                self.registry.unloaded.discard(name)
                self._remembered.changed()
        self._config = wanted
        return refused

    def _add_configured(self, entry: AdapterEntry) -> None:
        """At the start nothing is examined yet: `check_all` does, when the engine is ready for it."""
        self._config[entry.name] = entry
        if entry.name in self.registry.unloaded:
            return
        try:
            self.registry.put(entry)
        except MultiloraError as error:
            log.error("adapters: %s is not taken over: %s", entry.name, error.message)
            return
        record = self._new(entry)
        if self.registry.pinned(entry):
            self.revisions.pin(record)

    def _restore_loaded(self) -> None:
        saved = self._remembered.saved
        self.registry.unloaded.update(saved.unloaded)
        self.registry.pins.update(saved.pins)
        for kept in saved.adapters:
            try:
                source = replace(self._admit(kept.source), sha256=kept.sha256)
                entry = AdapterEntry(kept.name, source, Origin.ADMIN, False, kept.tenants, kept.version)
                self.registry.put(entry)
            except MultiloraError as error:
                log.error("adapter %s of an earlier run is left out: %s", kept.name, error.message)
                self._remembered.unusable.append(kept)
                continue
            record = self._new(entry)
            if self.registry.pinned(entry):
                self.revisions.pin(record)

    def _restore_aliases(self) -> None:
        saved, restored = self._remembered.saved, []
        for kept in saved.revisions:
            current = self.registry.get(kept.name)
            try:
                same = current is not None and current.source.text == kept.source
                source = current.source if same and current is not None else self._admit(kept.source)
                entry = AdapterEntry(kept.name, source, Origin.ADMIN, False, kept.tenants, kept.version)
                restored.append(self.revisions.restore(entry, kept.version))
            except MultiloraError as error:
                log.error("version %s of adapter %s is left out: %s", kept.version, kept.name, error.message)
        for alias, target in in_order(saved.aliases):
            try:
                self.alias(alias, target)
            except MultiloraError as error:
                log.error("alias %s of an earlier run is left out: %s", alias, error.message)
        for record in restored:
            self.revisions.settle(record)
