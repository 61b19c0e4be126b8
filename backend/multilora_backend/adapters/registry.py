# SPDX-License-Identifier: Apache-2.0
"""What may be asked for: names with their entries, aliases, and how both resolve. Pure bookkeeping, no weights.

Nothing here goes through all names but `entries`: a registry of 10,000 costs a request as much as one of ten.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from multilora_backend.adapters.catalogue import MAX_NAME, MAX_NAMES_IN_ERROR, name_problem
from multilora_backend.adapters.entry import AdapterEntry, Origin
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

MIN_VERSION_DIGITS = 6
_VERSION = re.compile(rf"[0-9a-f]{{{MIN_VERSION_DIGITS},}}")


class Registry:
    """Entries by name and aliases; every method either does all it says or raises and changes nothing."""

    def __init__(self) -> None:
        self.aliases: dict[str, str] = {}
        """Alias -> name, name@version or another alias. Every chain ends at a name that exists or once did."""
        self.unloaded: set[str] = set()
        """Names of the configured source that a command has unloaded: they stay away until a command loads them."""
        self.pins: dict[str, bool] = {}
        """What commands have said of names; of others their entries say it."""
        self.loaded: dict[str, AdapterEntry] = {}
        """Those of the entries that commands have made."""
        self._entries: dict[str, AdapterEntry] = {}
        self._public: dict[str, None] = {}
        """Names that every tenant may know of."""
        self._leading_to: dict[str, set[str]] = {}
        """Target of an alias, as written -> aliases."""

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> AdapterEntry | None:
        return self._entries.get(name)

    def entries(self) -> Iterator[AdapterEntry]:
        return iter(self._entries.values())

    def pinned(self, entry: AdapterEntry) -> bool:
        return self.pins.get(entry.name, entry.pinned)

    def put(self, entry: AdapterEntry) -> None:
        """Adds a name or changes its entry. Raises MultiloraError if the name is bad, an alias, or another origin's."""
        self.check(entry)
        self._entries[entry.name] = entry
        if entry.origin is Origin.ADMIN:
            self.loaded[entry.name] = entry
        self._public.pop(entry.name, None)
        if not entry.tenants:
            self._public[entry.name] = None

    def check(self, entry: AdapterEntry) -> None:
        """Raises what `put` would."""
        problem = name_problem(entry.name)
        if problem:
            raise invalid("name", f"{entry.name[: MAX_NAME + 1]!r} {problem}")
        if entry.name in self.aliases:
            raise invalid("name", f"{entry.name!r} is an alias of {self.aliases[entry.name]!r}; unalias it first")
        before = self._entries.get(entry.name)
        if before is not None and before.origin is not entry.origin:
            whose = "the configured adapters" if before.origin is Origin.CONFIG else "a load command"
            raise invalid("name", f"{entry.name!r} is taken: it comes from {whose}, {before.source.text}")

    def remove(self, name: str) -> None:
        """Raises MultiloraError if an alias leads to the name: it would lead nowhere."""
        aliases = self.leading_to(name)
        if aliases:
            raise invalid("name", f"{name!r} is what {', '.join(map(repr, aliases))} stands for; move the alias first")
        self.forget(name)

    def forget(self, name: str) -> None:
        """Without asking: its aliases lead nowhere from now on, and say so when they are asked for."""
        self._entries.pop(name, None)
        self.loaded.pop(name, None)
        self._public.pop(name, None)
        self.pins.pop(name, None)

    def alias(self, alias: str, target: str) -> None:
        """Sets or moves an alias, at once for everybody. Raises MultiloraError for a bad name, target, or a cycle."""
        problem = name_problem(alias)
        if problem:
            raise invalid("alias", f"{alias[: MAX_NAME + 1]!r} {problem}")
        if alias in self._entries:
            raise invalid("alias", f"{alias!r} is the name of an adapter")
        name, version = split_version(target, "target")
        if name not in self._entries and (name not in self.aliases or version):
            raise invalid("target", f"{name[:MAX_NAME]!r} is no adapter")
        if alias == name or alias in self._chain(name):
            raise invalid("target", f"{target!r} leads back to the alias {alias!r}")
        self.unalias(alias)
        self.aliases[alias] = target
        self._leading_to.setdefault(target, set()).add(alias)

    def unalias(self, alias: str) -> None:
        """An alias that does not exist is gone already."""
        target = self.aliases.pop(alias, None)
        if target is not None:
            self._leading_to[target].discard(alias)
            if not self._leading_to[target]:
                del self._leading_to[target]

    def follow(self, asked: str) -> tuple[str, str]:
        """Name and version ("" for the current one) behind a name, an alias or `name@version`.

        Raises MultiloraError for a version that is none, with vllm_backend's words for a name that is unknown.
        """
        name = self._chain(asked)[-1] if asked in self.aliases else asked
        name, version = split_version(name, "lora_name")
        if name not in self._entries:
            raise self.unknown(asked)
        return name, version

    def leading_to(self, name: str) -> list[str]:
        """Aliases that lead to a name or one of its versions, also by way of other aliases, sorted."""
        found: set[str] = set()
        targets = [t for t in self._leading_to if t == name or t.partition("@")[0] == name]
        while targets:
            new = self._leading_to.get(targets.pop(), set()) - found
            found |= new
            targets += new
        return sorted(found)

    def unknown(self, asked: str) -> MultiloraError:
        """vllm_backend's error for an unknown name. Lists what every tenant may know of; a long list is cut."""
        shown = str(list(islice(self._public, MAX_NAMES_IN_ERROR)))
        if len(self._public) > MAX_NAMES_IN_ERROR:
            shown += f" ... and {len(self._public) - MAX_NAMES_IN_ERROR} more"
        asked = asked if len(asked) <= MAX_NAME else asked[:MAX_NAME] + "..."
        return MultiloraError(ErrorCode.INVALID_ARG, f"LoRA {asked} is not supported, we currently support {shown}")

    def _chain(self, name: str) -> list[str]:
        """A name and what it leads to, alias after alias; its last is no alias."""
        chain = [name]
        while chain[-1] in self.aliases:
            chain.append(self.aliases[chain[-1]])
        return chain


def split_version(asked: str, field: str) -> tuple[str, str]:
    """`name@version` -> both; the version is "" where there is no @. Raises MultiloraError if it is no version."""
    name, at, version = asked.partition("@")
    if at and not _VERSION.fullmatch(version):
        digits = f"{MIN_VERSION_DIGITS} or more hexadecimal digits"
        raise invalid(field, f"the version in {asked[: MAX_NAME + 40]!r} must be {digits}")
    return name, version
