# SPDX-License-Identifier: Apache-2.0
"""The folder in which the front ends of one model find each other, and their election of a leader.

Everything is decided by file locks, since the kernel drops them whatever a process dies of:
`leader` is held by the one front end that may start the engine, `members` is shared by all that are attached.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from multilora_backend.config import Config
from multilora_backend.errors import invalid
from multilora_backend.processes import start_time

_SERVED = "served.json"
_SOCKET = "engine.sock"
_MAX_SOCKET_PATH = 107
"""Bytes in sockaddr_un.sun_path, less the closing zero."""


def folder_for(config: Config, model: str, version: str, server_pid: int) -> Path:
    """The same for all front ends of a model in a server, and for nobody else.

    A pid alone would not do: in a container tritonserver is often pid 1, again and again, with one /tmp.
    """
    digest = hashlib.sha256(f"{model} {version} {_server(server_pid)} {config.to_json()}".encode()).hexdigest()
    name = "".join(c if c.isalnum() else "_" for c in model[:16])
    return base_for(config.runtime_dir) / f"{server_pid}-{name}-{version}-{digest[:10]}"


def base_for(runtime_dir: str) -> Path:
    """The folder of all runtime folders."""
    return Path(runtime_dir or Path(tempfile.gettempdir(), f"multilora-{os.geteuid()}"))


def find(runtime_dir: str, model: str, server_pid: int) -> list[Path]:
    """The folders in which front ends of a model of this server have met, the highest version first.

    For those who know neither the version nor the configuration.
    """
    found = []
    base = base_for(runtime_dir)
    for path in base.glob(f"{server_pid}-*/{_SERVED}"):
        try:
            served = json.loads(path.read_text())
        except (OSError, ValueError):  # removed meanwhile
            continue
        if served["model"] == model and served["server"] == _server(server_pid):
            found.append((int(served["version"]), path.parent))
    if found and not _is_private(base):  # somebody else may have put them there
        return []
    return [path for _, path in sorted(found, reverse=True)]


def _server(pid: int) -> str:
    """A process that no other is, was or will be on this machine."""
    return f"{start_time(pid)} {os.stat('/proc/self/ns/pid').st_ino}"


def address(folder: Path) -> str:
    """Of the engine whose runtime folder this is."""
    return f"ipc://{folder / _SOCKET}"


class RuntimeFolder:
    """One front end's place in the folder. Not thread-safe: the link's thread is its only user."""

    def __init__(self, path: Path) -> None:
        """Makes the folder and joins it. Raises MultiloraError if the place is not ours alone or the path too long."""
        self.path = path
        if len(os.fsencode(self.socket)) > _MAX_SOCKET_PATH:
            raise invalid("runtime_dir", f"is too long for a socket's path: {self.socket}")
        _make_private(path.parent)
        _sweep(path.parent)
        self._members = self._join()
        self._leader: int | None = None

    def announce(self, model: str, version: str, server_pid: int) -> None:
        """Says in the folder whose it is, for `find`."""
        temporary = self.path / f"{_SERVED}.{os.getpid()}"
        temporary.write_text(json.dumps({"model": model, "version": version, "server": _server(server_pid)}))
        temporary.replace(self.path / _SERVED)

    @property
    def socket(self) -> Path:
        return self.path / _SOCKET

    @property
    def leads(self) -> bool:
        return self._leader is not None

    def try_lead(self) -> bool:
        """True if this front end is, or has just become, the leader; it stays so until `leave`."""
        if self._leader is None:
            self._leader = _lock(self.path / "leader", fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self.leads

    def last(self) -> bool:
        """Leaves the other members, and says whether there are none. Then nobody can join before `leave`."""
        try:
            # Linux drops our share before it looks at the others', so of two that ask at once one hears True.
            fcntl.flock(self._members, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def leave(self, remove: bool) -> None:
        """Gives up all locks; `remove` also deletes the folder, which only the last member may ask for."""
        if remove:
            shutil.rmtree(self.path, ignore_errors=True)
        for lock in (self._leader, self._members):
            if lock is not None:
                os.close(lock)
        self._leader = None

    def _join(self) -> int:
        """Waits while the last of the former members removes the folder, then makes it anew."""
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            try:
                lock = _lock(self.path / "members", fcntl.LOCK_SH)
            except FileNotFoundError:  # removed between the two lines above
                continue
            if lock is not None:
                return lock


def _lock(path: Path, kind: int) -> int | None:
    """The locked file's descriptor; None if another holds the lock, or if the file was removed while we waited."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, kind)
        if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _make_private(base: Path) -> None:
    """The system's temporary folder is everybody's: another user's folder, or a link of theirs, is not trusted."""
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(base):
        raise invalid("runtime_dir", f"{base} must be a folder that belongs to and is writable by this user alone")


def _is_private(base: Path) -> bool:
    status = os.lstat(base)
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022 and base.is_dir() and not base.is_symlink()


def _sweep(base: Path) -> None:
    """Removes the folders of servers that were killed: those without members."""
    for members in base.glob("*-*/members"):
        try:
            lock = _lock(members, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:  # another front end, which starts at the same time, has swept it
            continue
        if lock is not None:
            shutil.rmtree(members.parent, ignore_errors=True)
            os.close(lock)
