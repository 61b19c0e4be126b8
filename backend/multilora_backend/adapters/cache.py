# SPDX-License-Identifier: Apache-2.0
"""Gives every source as a folder of this machine; what comes over the network is kept on disk with its checksums.

    adapter_cache_dir / hash of the source / hash of the content / adapter_config.json, adapter_model.safetensors,
                                                                   source.json

A folder appears there complete or not at all, by a rename, and is read through once more before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from multilora_backend.adapters.folder import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, member
from multilora_backend.adapters.peft import check_sha256
from multilora_backend.adapters.remote import CHUNK_BYTES, FILES, Remote, RemoteFile, check_size, open_remote
from multilora_backend.adapters.sources import ARCHIVES, Kind, Source
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

log = logging.getLogger(__name__)

MANIFEST = "source.json"
KEPT = 2
"""Contents kept of each source: whoever is reading the one before the newest is not disturbed."""
PART = ".part-"
STALE_S = 3600.0
"""A download that has written nothing for so long has died."""
_publishing = threading.Lock()
_COMMIT = re.compile(r"[0-9a-f]{40}")


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multilora" / "adapters"


def fetch(source: Source, cache_dir: Path, max_bytes: int) -> Path:
    """A folder that holds the adapter: the source's own, or a copy in the cache. May take as long as a download.

    Raises MultiloraError for what will fail again until the source changes: it is gone, outside of the allowed roots,
    an archive, pickled, larger than `max_bytes` a file, or has another checksum. Raises OSError for what may pass. A
    download that breaks off leaves nothing behind. If the network is away, what was fetched last is used.
    """
    return _local(source, max_bytes) if source.is_local else _cached(source, cache_dir, max_bytes)


def _local(source: Source, max_bytes: int) -> Path:
    folder = source.path
    if folder.is_file():
        if folder.name.lower().endswith(ARCHIVES):
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"{folder}: archives are not unpacked; name a folder")
        raise invalid(str(folder), "is a file; an adapter is a folder")
    if not folder.is_dir():
        raise MultiloraError(ErrorCode.NOT_FOUND, f"{folder}: does not exist")
    real = folder.resolve()
    if source.inside and not any(real.is_relative_to(root) for root in source.inside):
        raise invalid(str(folder), f"leads to {real}, outside of adapter_roots")
    check_size(CONFIG, member(folder, CONFIG, source.inside).stat().st_size, MAX_CONFIG_BYTES)
    check_size(WEIGHTS, member(folder, WEIGHTS, source.inside).stat().st_size, max_bytes)
    return folder


@dataclass(frozen=True)
class _Kept:
    """A content of a source in the cache."""

    folder: Path
    remote: dict[str, RemoteFile]
    """The server's words for it."""
    sha256: dict[str, str]

    def intact(self) -> bool:
        try:
            return all(_digest(self.folder / name) == self.sha256[name] for name in FILES)
        except OSError:
            return False


def _cached(source: Source, cache_dir: Path, max_bytes: int) -> Path:
    place = cache_dir / hashlib.sha256(source.text.encode()).hexdigest()[:32]
    kept = _kept(place)
    if source.kind is Kind.HUB and _COMMIT.fullmatch(source.revision) and kept and kept[0].intact():
        return _checked(kept[0], source)  # a commit never changes
    try:
        remote = open_remote(source)
        files = remote.files()
    except OSError as error:
        if kept and kept[0].intact():
            log.warning("%s; the copy of before is used", error)
            return _checked(kept[0], source)
        raise
    for one in kept:
        # Without a tag nobody knows whether the content is the same, so it is fetched again.
        if one.remote == files and all(file.tag for file in files.values()) and one.intact():
            return _checked(one, source)
    check_size(CONFIG, files[CONFIG].size, MAX_CONFIG_BYTES)
    check_size(WEIGHTS, files[WEIGHTS].size, max_bytes)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    for part in place.glob(PART + "*"):
        _drop_if_stale(part)
    return _download(source, remote, files, place, max_bytes).folder


def _download(source: Source, remote: Remote, files: dict[str, RemoteFile], place: Path, max_bytes: int) -> _Kept:
    part = Path(tempfile.mkdtemp(prefix=PART, dir=place))
    try:
        digests = {}
        for name, limit in ((CONFIG, MAX_CONFIG_BYTES), (WEIGHTS, max_bytes)):
            remote.download(name, part / name, limit)
            size, digests[name] = (part / name).stat().st_size, _digest(part / name)
            if files[name].size not in (None, size):
                raise OSError(f"{source.text}: {name} broke off: {size} bytes of {files[name].size}")
            if files[name].sha256 not in ("", digests[name]):
                raise OSError(f"{source.text}: {name} arrived damaged: sha256 {digests[name]}")
        if source.sha256:
            check_sha256(digests[WEIGHTS], source.sha256)
        remote_words = {name: asdict(file) for name, file in files.items()}
        manifest = {"source": source.text, "remote": remote_words, "sha256": digests}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
        content = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]
        kept = _Kept(place / content, files, digests)
        with _publishing:
            _publish(part, kept)
        for one in [one for one in _kept(place) if one.folder != kept.folder][KEPT - 1 :]:
            shutil.rmtree(one.folder, ignore_errors=True)
        return kept
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, kept: _Kept) -> None:
    """Makes a finished download the content that it is. Under the lock; other processes may do the same meanwhile."""
    if kept.intact():
        # The same content under new words of the server. Somebody may be reading it, so it stays.
        (part / MANIFEST).replace(kept.folder / MANIFEST)
        return
    with contextlib.suppress(FileNotFoundError):
        kept.folder.rename(part / "damaged")
    try:
        part.rename(kept.folder)
    except OSError:
        if not kept.intact():
            raise
    shutil.rmtree(kept.folder / "damaged", ignore_errors=True)


def _checked(kept: _Kept, source: Source) -> Path:
    if source.sha256:
        check_sha256(kept.sha256[WEIGHTS], source.sha256)
    with contextlib.suppress(OSError):
        os.utime(kept.folder / MANIFEST)  # the newest again
    return kept.folder


def _kept(place: Path) -> list[_Kept]:
    """What is there, the newest first. A manifest that cannot be read is no manifest."""
    found = []
    for path in place.glob(f"[!.]*/{MANIFEST}"):  # pathlib's * would find unfinished downloads, too
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(path.read_text())
            remote = {name: RemoteFile(**said["remote"][name]) for name in FILES}
            one = _Kept(path.parent, remote, {name: said["sha256"][name] for name in FILES})
            found.append((path.stat().st_mtime_ns, one))
    return [one for _, one in sorted(found, key=lambda item: item[0], reverse=True)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _drop_if_stale(part: Path) -> None:
    with contextlib.suppress(OSError):
        newest = max((path.stat().st_mtime for path in (part, *part.rglob("*"))), default=0.0)
        if time.time() - newest > STALE_S:
            shutil.rmtree(part, ignore_errors=True)
