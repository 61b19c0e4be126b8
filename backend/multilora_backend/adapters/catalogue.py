# SPDX-License-Identifier: Apache-2.0
"""What the operator lists: the names that clients may ask for, and the source of each. Clients never give paths."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.peft import fingerprint
from multilora_backend.adapters.sources import Kind, Roots, Source, parse_source
from multilora_backend.core import COMPOSED
from multilora_backend.documents import UniqueKeys, without_duplicates
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

log = logging.getLogger(__name__)

MAX_NAME = 128
MAX_NAMES_IN_ERROR = 50
RESERVED = frozenset({"__base__", "__other__", COMPOSED})
"""Names that mean something else: the base model's traffic, that of many, and that of compositions, in reports."""
RESERVED_CHARACTERS = "/\\,:@"
"""Path separators, and what separates names, weights and versions where several are named at once."""


class Catalogue:
    """Immutable. Iterates over its names in order: sorted for a folder, as written for a file."""

    def __init__(self, adapters: Iterable[AdapterEntry | tuple[str, Path]]) -> None:
        """Raises MultiloraError if a name is bad or occurs twice."""
        self._entries: dict[str, AdapterEntry] = {}
        for adapter in adapters:
            entry = (
                adapter if isinstance(adapter, AdapterEntry) else AdapterEntry(adapter[0], Source.of_folder(adapter[1]))
            )
            problem = name_problem(entry.name)
            if problem:
                raise invalid("adapters", f"the name {entry.name!r} {problem}")
            if entry.name in self._entries:
                raise invalid("adapters", f"the name {entry.name!r} occurs twice")
            self._entries[entry.name] = entry

    @classmethod
    def read(cls, source: str, roots: Roots | None = None, pause: Callable[[], None] = lambda: None) -> Catalogue:
        """Reads a folder of adapter folders, or a YAML or JSON file.

        A file is `{name: source}`, `{name: {source: ...}}` or `{adapters: [{name: ..., source: ...}]}`; its paths are
        relative to it. What a source holds is not looked at here: a broken adapter is listed, so that asking for it
        gives the reason. `roots` None: as without `adapter_roots`. `pause` is called after each adapter.

        Raises MultiloraError if the source cannot be read, or is a file with a bad or duplicate name or an entry that
        is malformed or outside of `roots`.
        """
        path = Path(source)
        roots = Roots.for_operator("", source) if roots is None else roots
        try:
            return cls(_paused(_from_folder(path, roots) if path.is_dir() else _from_file(path, roots), pause))
        except OSError as error:
            raise invalid("adapters", f"{source} cannot be read: {error.strerror or error}") from error

    @property
    def entries(self) -> tuple[AdapterEntry, ...]:
        return tuple(self._entries.values())

    def names(self) -> list[str]:
        return list(self._entries)

    def path(self, name: str) -> Path:
        """Of a local source. Raises MultiloraError with vllm_backend's words if the name is unknown."""
        if name not in self._entries:
            raise self.unknown(name)
        return self._entries[name].source.path

    def unknown(self, name: str) -> MultiloraError:
        """vllm_backend's error for a name that is not in the catalogue; a long list of names is cut."""
        names = self.names()
        shown = str(names[:MAX_NAMES_IN_ERROR])
        if len(names) > MAX_NAMES_IN_ERROR:
            shown += f" ... and {len(names) - MAX_NAMES_IN_ERROR} more"
        asked = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
        return MultiloraError(ErrorCode.INVALID_ARG, f"LoRA {asked} is not supported, we currently support {shown}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def name_problem(name: str) -> str:
    """What is wrong with an adapter's name, as the rest of a sentence; empty if nothing."""
    if not 1 <= len(name) <= MAX_NAME:
        return f"must have 1 to {MAX_NAME} characters"
    if not name.isprintable() or name != name.strip():
        return "must be printable, without spaces at its ends"
    if ".." in name or any(character in name for character in RESERVED_CHARACTERS):
        return f"must not contain '..' or any of {' '.join(RESERVED_CHARACTERS)}"
    if name in RESERVED:
        return "is reserved"
    return ""


def _paused(entries: Iterable[AdapterEntry], pause: Callable[[], None]) -> Iterator[AdapterEntry]:
    for entry in entries:
        yield entry
        pause()


def _from_folder(folder: Path, roots: Roots) -> Iterator[AdapterEntry]:
    if (folder / "adapter_config.json").exists():
        raise invalid("adapters", f"{folder} is one adapter; name the folder that holds adapter folders")
    place = os.path.abspath(folder)
    for name in sorted(os.listdir(folder)):
        path = f"{place}/{name}"
        if name.startswith(".") or not _looks_like_adapter(path):
            continue
        problem = name_problem(name)
        if problem:
            # One odd folder must not keep the server from starting, as a file that names it would.
            log.warning("adapters: %s is left out: its name %s", ascii(path), problem)
        else:
            source = Source(Kind.FOLDER, path, inside=roots.folders)
            yield AdapterEntry(name, source, fingerprint=fingerprint(path))


def _looks_like_adapter(folder: str) -> bool:
    """Also what is broken looks like one: it is listed, and asking for it gives the reason."""
    try:
        return any(name == "adapter_config.json" or name.startswith("adapter_model") for name in os.listdir(folder))
    except OSError:
        return False


def _from_file(file: Path, roots: Roots) -> Iterator[AdapterEntry]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            content = json.loads(text, object_pairs_hook=without_duplicates)
        else:
            content = yaml.load(text, Loader=UniqueKeys)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise invalid("adapters", f"{file}: {error}") from error
    for name, fields in _listed(content, file):
        yield _entry(name, fields, file, roots)


def _listed(content: Any, file: Path) -> list[tuple[Any, dict[str, Any]]]:
    """Names, and what is said of each."""
    if content is None:
        return []
    if not isinstance(content, dict):
        raise invalid("adapters", f"{file}: must map names to sources, got {type(content).__name__}")
    listed = content.get("adapters")
    if not isinstance(listed, list):
        return [(name, said if isinstance(said, dict) else {"source": said}) for name, said in content.items()]
    if len(content) > 1:
        unknown = ", ".join(repr(key) for key in content if key != "adapters")
        raise invalid("adapters", f"{file}: unknown key {unknown} beside 'adapters'")
    for said in listed:
        if not isinstance(said, dict) or "name" not in said:
            raise invalid("adapters", f"{file}: each adapter must have a name and a source, got {said!r}")
    return [(said["name"], {key: value for key, value in said.items() if key != "name"}) for said in listed]


def _entry(name: Any, said: dict[str, Any], file: Path, roots: Roots) -> AdapterEntry:
    def require(ok: bool, problem: str) -> None:
        if not ok:
            raise invalid("adapters", f"{file}: {name!r}: {problem}")

    unknown = sorted(map(repr, set(said) - {"source", "path", "pinned", "tenants", "sha256"}))
    require(not unknown, f"unknown key {', '.join(unknown)}; known are source (or path), pinned, tenants, sha256")
    require(len({"source", "path"} & set(said)) == 1, "needs a source")
    text: Any = said.get("source", said.get("path"))
    pinned = said.get("pinned", False)
    tenants, sha256 = said.get("tenants", []), said.get("sha256", "")
    require(
        isinstance(name, str) and isinstance(text, str) and bool(text), f"name and source must be strings: {text!r}"
    )
    require(isinstance(pinned, bool), f"pinned must be true or false, got {pinned!r}")
    require(isinstance(sha256, str), f"sha256 must be a string, got {sha256!r}")
    strings = isinstance(tenants, list) and all(isinstance(tenant, str) and tenant for tenant in tenants)
    require(
        strings and len(set(tenants)) == len(tenants), f"tenants must be a list of different names, got {tenants!r}"
    )
    try:
        source = parse_source(text, roots, file.parent, sha256)
    except MultiloraError as error:
        raise MultiloraError(error.code, f"adapters: {file}: {name!r}: {error.message}") from error
    found = fingerprint(source.location) if source.is_local else None
    return AdapterEntry(name, source, pinned=pinned, tenants=tuple(tenants), fingerprint=found)
