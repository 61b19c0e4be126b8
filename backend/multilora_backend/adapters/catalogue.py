# SPDX-License-Identifier: Apache-2.0
"""The names that clients may ask for, and the folder behind each. Clients give names and never paths."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from multilora_backend.errors import ErrorCode, MultiloraError, invalid

log = logging.getLogger(__name__)

MAX_NAME = 128
MAX_NAMES_IN_ERROR = 50
RESERVED = frozenset({"__base__"})
"""Names that mean something else: the base model's traffic in reports."""
RESERVED_CHARACTERS = "/\\,:@"
"""Path separators, and what separates names, weights and versions where several are named at once."""


class Catalogue:
    """Immutable. Iterates over its names in order: sorted for a folder, as written for a file."""

    def __init__(self, adapters: Iterable[tuple[str, Path]]) -> None:
        """Raises MultiloraError if a name is bad or occurs twice."""
        self._paths: dict[str, Path] = {}
        for name, path in adapters:
            problem = name_problem(name)
            if problem:
                raise invalid("adapters", f"the name {name!r} {problem}")
            if name in self._paths:
                raise invalid("adapters", f"the name {name!r} occurs twice")
            self._paths[name] = path

    @classmethod
    def read(cls, source: str) -> Catalogue:
        """Reads a folder of adapter folders, or a YAML or JSON file.

        A file is `{name: folder}` or `{adapters: [{name: ..., path: ...}]}`; its paths are relative to it. What a
        folder holds is not looked at here: a broken adapter is listed, so that asking for it gives the reason.

        Raises MultiloraError if the source cannot be read, or is a file with a bad or duplicate name.
        """
        path = Path(source)
        try:
            if path.is_dir():
                return cls(_from_folder(path))
            return cls(_from_file(path))
        except OSError as error:
            raise invalid("adapters", f"{source} cannot be read: {error.strerror or error}") from error

    def names(self) -> list[str]:
        return list(self._paths)

    def path(self, name: str) -> Path:
        """Raises MultiloraError with vllm_backend's words if the name is unknown."""
        if name not in self._paths:
            raise self.unknown(name)
        return self._paths[name]

    def unknown(self, name: str) -> MultiloraError:
        """vllm_backend's error for a name that is not in the catalogue; a long list of names is cut."""
        names = self.names()
        shown = str(names[:MAX_NAMES_IN_ERROR])
        if len(names) > MAX_NAMES_IN_ERROR:
            shown += f" ... and {len(names) - MAX_NAMES_IN_ERROR} more"
        asked = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
        return MultiloraError(ErrorCode.INVALID_ARG, f"LoRA {asked} is not supported, we currently support {shown}")

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


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


def _from_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    if (folder / "adapter_config.json").exists():
        raise invalid("adapters", f"{folder} is one adapter; name the folder that holds adapter folders")
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or not entry.is_dir() or not _looks_like_adapter(entry):
            continue
        problem = name_problem(entry.name)
        if problem:
            # One odd folder must not keep the server from starting, as a file that names it would.
            log.warning("adapters: %s is left out: its name %s", ascii(str(entry)), problem)
        else:
            yield entry.name, entry


def _looks_like_adapter(folder: Path) -> bool:
    """Also what is broken looks like one: it is listed, and asking for it gives the reason."""
    return (folder / "adapter_config.json").exists() or any(folder.glob("adapter_model*"))


def _from_file(file: Path) -> list[tuple[str, Path]]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            content = json.loads(text, object_pairs_hook=_without_duplicates)
        else:
            content = yaml.load(text, Loader=_UniqueKeys)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise invalid("adapters", f"{file}: {error}") from error
    entries = _entries(content, file)
    for name, path in entries:
        if not isinstance(name, str) or not isinstance(path, str) or not path:
            raise invalid("adapters", f"{file}: name and path must be strings, got {name!r}: {path!r}")
    return [(name, file.parent / path) for name, path in entries]


def _entries(content: Any, file: Path) -> list[tuple[Any, Any]]:
    if content is None:
        return []
    if not isinstance(content, dict):
        raise invalid("adapters", f"{file}: must map names to folders, got {type(content).__name__}")
    listed = content.get("adapters")
    if not isinstance(listed, list):
        return list(content.items())
    if len(content) > 1:
        unknown = ", ".join(repr(key) for key in content if key != "adapters")
        raise invalid("adapters", f"{file}: unknown key {unknown} beside 'adapters'")
    for entry in listed:
        if not isinstance(entry, dict) or set(entry) != {"name", "path"}:
            raise invalid(
                "adapters", f"{file}: each adapter must have a name and a path and nothing else, got {entry!r}"
            )
    return [(entry["name"], entry["path"]) for entry in listed]


def _without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Both parsers would let the last of two equal names win, in silence."""
    mapping: dict[Any, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the name {key!r} occurs twice")
        mapping[key] = value
    return mapping


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if all(isinstance(key, Hashable) for key in keys):
            _without_duplicates([(key, None) for key in keys])
        return super().construct_mapping(node, deep)
