# SPDX-License-Identifier: Apache-2.0
"""Where an adapter may come from: a folder, a repository of the Hugging Face hub, or a URL, if the operator allows it.

Nothing here looks at what a source holds; `cache.fetch` does, in loader threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fsspec.registry import known_implementations

from multilora_backend.errors import ErrorCode, MultiloraError, invalid

MAX_SOURCE = 2048
"""Characters of a source."""
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl")
_ARCHIVE_SCHEMES = frozenset({"zip", "tar", "libarchive", "gzip"})
_DEFAULT_PORTS = {"http": "80", "https": "443"}

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_HUB = re.compile(r"(?P<place>[\w.-]+/[\w.-]+(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]{1,255}))?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Kind(str, Enum):
    FOLDER = "folder"
    HUB = "hub"
    URL = "url"
    PARTS = "parts"
    """Other adapters, which have sources of their own: the location tells which ones, to people."""


@dataclass(frozen=True)
class Source:
    kind: Kind
    location: str
    """An absolute path; `owner/repository[/folder]`; or a normalised URL of a folder."""
    revision: str = ""
    """Of a hub's repository: branch, tag or commit; empty: its main branch."""
    sha256: str = ""
    """What adapter_model.safetensors must have, in lower-case hex; empty: anything."""
    inside: tuple[Path, ...] = ()
    """A folder and all that its links lead to must lie in one of these. Empty: the folder may lie anywhere, and
    links may not leave it."""

    @property
    def text(self) -> str:
        """As an operator would write it; equal texts are the same source."""
        if self.kind is Kind.HUB:
            return f"hf:{self.location}" + (f"@{self.revision}" if self.revision else "")
        return self.location

    @property
    def is_local(self) -> bool:
        return self.kind is Kind.FOLDER

    @property
    def path(self) -> Path:
        """Of a local source."""
        if not self.is_local:
            raise ValueError(f"{self.text} is no folder of this machine")
        return Path(self.location)

    @classmethod
    def of_folder(cls, path: Path, inside: Iterable[Path] = ()) -> Source:
        """A folder that nobody asked for by name, such as one of a watched folder's. Not checked."""
        return cls(Kind.FOLDER, os.path.abspath(path), inside=tuple(inside))


@dataclass(frozen=True)
class Roots:
    """The operator's allow-list."""

    folders: tuple[Path, ...] = ()
    """Resolved."""
    prefixes: tuple[str, ...] = ()
    """Normalised URLs, and `hf://owner/repository` for the hub; each admits what lies below it."""
    any_folder: bool = False
    """Every folder of this machine is admitted."""

    @classmethod
    def parse(cls, text: str) -> Roots:
        """Reads `adapter_roots`. Raises MultiloraError if one of them is neither folder nor hub nor URL."""
        folders, prefixes = [], []
        for root in filter(None, (_plain(part.strip()) for part in text.split(","))):
            if root.startswith("hf:"):
                prefixes.append("hf://" + root[3:].strip("/"))
            elif _is_url(root):
                prefixes.append(_normalised(root, "adapter_roots"))
            elif os.path.isabs(root):
                folders.append(Path(root).resolve())
            else:
                raise invalid("adapter_roots", f"{root!r} must be an absolute path, hf:owner[/repository] or a URL")
        return cls(tuple(folders), tuple(prefixes))

    @classmethod
    def for_operator(cls, adapter_roots: str, adapters: str) -> Roots:
        """For what `adapters` (a folder or a file) lists. Without `adapter_roots` a file may name any folder."""
        roots, place = cls.parse(adapter_roots), Path(adapters).resolve()
        folder = place if place.is_dir() else place.parent
        return cls((folder, *roots.folders), roots.prefixes, not adapter_roots and not place.is_dir())

    @classmethod
    def for_clients(cls, adapter_roots: str, adapters: str) -> Roots:
        """For what administration asks for. Without `adapter_roots` that is what lies in the folder `adapters`."""
        roots, place = cls.parse(adapter_roots), Path(adapters).resolve()
        return cls((place, *roots.folders) if place.is_dir() else roots.folders, roots.prefixes)

    def admits_folder(self, path: Path) -> bool:
        """Links are followed."""
        return self.any_folder or any(path.resolve().is_relative_to(root) for root in self.folders)

    def admits_url(self, url: str) -> bool:
        return any(url == root or url.startswith(root.rstrip("/") + "/") for root in self.prefixes)


def parse_source(text: str, roots: Roots, base: Path, sha256: str = "") -> Source:
    """Reads a path (relative ones are relative to `base`), `hf:owner/repository[/folder][@revision]`, or a URL.

    Raises MultiloraError: INVALID_ARG for what is malformed or not below one of `roots`, UNSUPPORTED for archives and
    unknown schemes.
    """
    if not 1 <= len(text) <= MAX_SOURCE or not text.isprintable():
        raise invalid("source", f"must be 1 to {MAX_SOURCE} printable characters")
    if sha256 and not _SHA256.fullmatch(sha256):
        raise invalid("sha256", f"must be 64 hexadecimal digits in lower case, got {sha256[:80]!r}")
    if text.lower().rstrip("/").endswith(ARCHIVES):
        raise MultiloraError(
            ErrorCode.UNSUPPORTED, f"source: archives are not unpacked, name a folder instead of {text!r}"
        )
    if text.startswith("hf:"):
        return _hub(text[3:].removeprefix("//"), roots, sha256)
    plain = _plain(text)
    if _is_url(plain):
        url = _normalised(plain, "source")
        if not roots.admits_url(url):
            raise _outside(text)
        return Source(Kind.URL, url, sha256=sha256)
    # Parent folders are taken away from the text as it stands: what is compared is what is opened later.
    path = Path(os.path.normpath(base.absolute() / plain))
    if not roots.admits_folder(path):
        raise _outside(text)
    return Source(Kind.FOLDER, str(path), sha256=sha256, inside=() if roots.any_folder else roots.folders)


def _hub(text: str, roots: Roots, sha256: str) -> Source:
    match = _HUB.fullmatch(text)
    if match is None or {".", ".."} & set(re.split("[/@]", text)):
        raise invalid("source", f"must be hf:owner/repository[/folder][@revision], got {'hf:' + text!r}")
    place = match["place"]
    if not roots.admits_url(f"hf://{place}"):
        raise _outside("hf:" + text)
    return Source(Kind.HUB, place, match["revision"] or "", sha256)


def _plain(text: str) -> str:
    """URLs of this machine's files as paths, so that links are looked at."""
    return unquote(urlsplit(text).path) if text.lower().startswith(("file://", "local://")) else text


def _is_url(text: str) -> bool:
    return _URL.match(text) is not None


def _normalised(url: str, field: str) -> str:
    """The one spelling of a URL that prefixes are compared in. Raises MultiloraError for what has more than one."""
    if "::" in url:
        raise invalid(field, f"chained URLs are refused, got {url!r}")
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if scheme in _ARCHIVE_SCHEMES:
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"{field}: archives are not unpacked, got {url!r}")
    if scheme not in known_implementations:
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"{field}: nothing here can read {scheme}:// URLs")
    if "?" in url or "#" in url or "\\" in url:
        raise invalid(field, f"a URL must have no query, fragment or backslash, got {url!r}")
    host = parts.netloc
    if "@" in host:
        # Not repeated: it holds a secret, and sources are shown and logged.
        raise invalid(field, "a URL must hold no user name or password; the environment is the place for them")
    if scheme in _DEFAULT_PORTS:
        host = host.lower().removesuffix(":" + _DEFAULT_PORTS[scheme])
    path = parts.path.strip("/")
    for segment in path.split("/") if path else ():
        plain = unquote(segment)
        if plain in ("", ".", "..") or "/" in plain or "\\" in plain:
            raise invalid(field, f"a URL must have no empty or relative segments, got {url!r}")
    return f"{scheme}://{host}/{path}" if path else f"{scheme}://{host}"


def _outside(text: str) -> MultiloraError:
    return invalid("source", f"{text!r} is not below any of adapter_roots")
