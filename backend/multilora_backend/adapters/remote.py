# SPDX-License-Identifier: Apache-2.0
"""An adapter's files on a hub or behind a URL: what is there, and copies of it. Network access, so loader threads only.

The libraries raise what they like; here every cause that may pass becomes OSError, and MultiloraError is what will be
the same next time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from multilora_backend.adapters.folder import CONFIG, PICKLED, PICKLED_REFUSED, WEIGHTS
from multilora_backend.adapters.sources import Kind, Source
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

FILES = (CONFIG, WEIGHTS)
"""All that is ever downloaded."""
CHUNK_BYTES = 4 * 2**20
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 30.0
"""Of http(s); other file systems and the hub's library have limits of their own."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_TAGS = ("ETag", "etag", "Content-MD5", "md5Hash", "checksum", "sha256", "generation", "VersionId", "Last-Modified",
         "LastModified", "last_modified", "mtime")  # fmt: skip


@dataclass(frozen=True)
class RemoteFile:
    size: int | None
    """In bytes; None if the server does not tell."""
    tag: str
    """Differs when the content does; empty if the server tells nothing of the kind."""
    sha256: str = ""
    """As the server has it; empty if unknown."""


class Remote(Protocol):
    def files(self) -> dict[str, RemoteFile]:
        """CONFIG and WEIGHTS. Raises MultiloraError if one is missing, or OSError."""
        ...

    def download(self, name: str, target: Path, limit: int) -> None:
        """Raises MultiloraError beyond `limit` bytes, or OSError. What it has written then is of no use."""
        ...


def open_remote(source: Source) -> Remote:
    """Raises MultiloraError if nothing installed can read the source."""
    return HubRemote(source) if source.kind is Kind.HUB else UrlRemote(source)


class HubRemote:
    """A repository of the Hugging Face hub; HF_ENDPOINT, HF_TOKEN and the login are the library's own business."""

    def __init__(self, source: Source) -> None:
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        self._source = source
        owner, name, *folders = source.location.split("/")
        self._repository = f"{owner}/{name}"
        self._folder = "".join(folder + "/" for folder in folders)
        self._commit = ""

    def files(self) -> dict[str, RemoteFile]:
        with _passing(self._source):
            revision = self._source.revision or None
            info = self._api.model_info(self._repository, revision=revision, files_metadata=True)
        # Both files come from this commit, whatever happens to the branch meanwhile.
        self._commit = info.sha or ""
        found = {}
        for file in info.siblings or ():
            if file.rfilename.startswith(self._folder):
                sha256 = file.lfs.sha256 if file.lfs else ""
                tag = sha256 or file.blob_id or ""
                found[file.rfilename.removeprefix(self._folder)] = RemoteFile(file.size, tag, sha256)
        return _complete(found, self._source)

    def download(self, name: str, target: Path, limit: int) -> None:
        with _passing(self._source):
            path = self._folder + name
            folder = target.with_name("hub")
            got = self._api.hf_hub_download(self._repository, path, revision=self._commit, local_dir=folder)
            Path(got).rename(target)
            shutil.rmtree(folder)
        check_size(name, target.stat().st_size, limit)


class UrlRemote:
    """Anything that fsspec reads. Credentials and end points come from the environment, as its drivers have it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        scheme = source.location.partition("://")[0]
        options: dict[str, Any] = {}
        self._open_options: dict[str, Any] = {}
        try:
            if scheme in ("http", "https"):
                import aiohttp  # the driver's own dependency; the client's HTTP side brings it

                timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
                options["client_kwargs"] = {"timeout": timeout}
                self._open_options["block_size"] = 0  # one stream: many servers know no ranges
            # Instances are cached, and so are the listings that they have seen.
            self._files, self._root = fsspec.url_to_fs(source.location, skip_instance_cache=True, **options)
        except (ImportError, ValueError) as error:
            extra = f": pip install 'multilora[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
            raise MultiloraError(
                ErrorCode.UNSUPPORTED, f"source: {scheme}:// cannot be read, {error}{extra}"
            ) from error

    def files(self) -> dict[str, RemoteFile]:
        found = {}
        for name in (*FILES, PICKLED):
            if name == PICKLED and WEIGHTS in found:
                break
            try:
                with _passing(self._source):
                    info = self._files.info(f"{self._root}/{name}")
            except MultiloraError as error:
                if error.code is not ErrorCode.NOT_FOUND:
                    raise
                continue
            tag = "; ".join(f"{key}: {info[key]}" for key in _TAGS if info.get(key))
            found[name] = RemoteFile(info.get("size"), tag)
        return _complete(found, self._source)

    def download(self, name: str, target: Path, limit: int) -> None:
        size = 0
        with (
            _passing(self._source),
            self._files.open(f"{self._root}/{name}", "rb", **self._open_options) as incoming,
            target.open("xb") as file,
        ):
            while chunk := incoming.read(CHUNK_BYTES):
                size += len(chunk)
                check_size(name, size, limit)
                file.write(chunk)


def check_size(name: str, size: int | None, limit: int) -> None:
    """Raises MultiloraError for a file of an adapter that is too large."""
    if size is not None and size > limit:
        raise invalid(name, f"has {size} bytes or more, adapter_max_bytes allows {limit}")


def _complete(found: dict[str, RemoteFile], source: Source) -> dict[str, RemoteFile]:
    if WEIGHTS not in found and PICKLED in found:
        raise MultiloraError(ErrorCode.UNSUPPORTED, PICKLED_REFUSED)
    for name in FILES:
        if name not in found:
            raise MultiloraError(ErrorCode.NOT_FOUND, f"{source.text}: has no {name}")
    return {name: found[name] for name in FILES}


@contextmanager
def _passing(source: Source) -> Iterator[None]:
    try:
        yield
    except MultiloraError:
        raise
    except Exception as error:  # botocore's, aiohttp's, httpx's: whatever a driver brings
        if _gone(error):
            said = "does not exist, or may not be read by this login"
            raise MultiloraError(ErrorCode.NOT_FOUND, f"{source.text}: {said}") from error
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        text = cause.server_message if isinstance(cause, HfHubHTTPError) and cause.server_message else cause
        raise OSError(f"{source.text}: {type(cause).__name__}: {text}") from error


def _gone(error: Exception) -> bool:
    """Two libraries call it "not found" as well when they could not ask: the hub's, and fsspec's for http."""
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return True
    if not isinstance(error, FileNotFoundError) or isinstance(error, LocalEntryNotFoundError):
        return False
    cause = error.__cause__
    return not type(cause).__module__.startswith(("aiohttp", "asyncio")) or getattr(cause, "status", 0) in (404, 410)
