# SPDX-License-Identifier: Apache-2.0
"""What outlives the server: what commands have done, and which version was found in which source."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from pathlib import Path

import msgspec

from multilora_backend.adapters.state import Fingerprint

log = logging.getLogger(__name__)

FORMAT = 1
CLOSE_TIMEOUT_S = 5.0


class SavedEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    source: str
    sha256: str = ""
    tenants: tuple[str, ...] = ()
    version: str = ""


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    format: int = FORMAT
    adapters: list[SavedEntry] = []
    """That commands have loaded."""
    revisions: list[SavedEntry] = []
    """That aliases name by their version, and that are not current."""
    aliases: dict[str, str] = {}
    pins: dict[str, bool] = {}
    unloaded: list[str] = []
    """Names of the configured adapters that commands have unloaded."""
    versions: dict[str, tuple[Fingerprint, str]] = {}
    """Source -> what its files looked like, and the version that they had."""

    @property
    def says_something(self) -> bool:
        """What cannot be found out again by reading the adapters."""
        return bool(self.adapters or self.revisions or self.aliases or self.pins or self.unloaded)


class StateFile:
    """Read once, at the start; written by a thread of its own, whole and by a rename, the newest state only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._news: Saved | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._writing = False
        self._thread: threading.Thread | None = None
        self._problem = ""

    def read(self) -> Saved:
        """A file that cannot be understood is set aside, and nothing is known then. Never raises."""
        try:
            saved = msgspec.json.decode(self.path.read_bytes(), type=Saved)
            if saved.format != FORMAT:
                raise ValueError(f"format {saved.format} is not {FORMAT}")
            return saved
        except FileNotFoundError:
            return Saved()
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            aside = self.path.with_name(self.path.name + ".broken")
            log.error("%s cannot be read and is set aside as %s: %s", self.path, aside.name, error)
            try:
                self.path.replace(aside)
            except OSError as problem:
                log.error("%s cannot be set aside: %s", self.path, problem)
            return Saved()

    def put(self, saved: Saved) -> None:
        """Returns at once. Versions alone are no reason to make a file where there is none."""
        if self._thread is None:
            if not saved.says_something and not self.path.exists():
                return
            self._thread = threading.Thread(target=self._work, name="adapter-state", daemon=True)
            self._thread.start()
        with self._changed:
            self._news = saved
            self._changed.notify()

    @property
    def idle(self) -> bool:
        """All that was put has been written, as far as it can be."""
        with self._changed:
            return self._news is None and not self._writing

    def close(self) -> None:
        """Writes what is new."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def write(self, saved: Saved) -> None:
        """Raises OSError; the file is then what it was."""
        data = msgspec.json.format(msgspec.json.encode(saved), indent=1)
        handle, part = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news is not None or self._closed)
                news, self._news = self._news, None
                self._writing = news is not None
            if news is None:
                return
            try:
                self.write(news)
                self._problem = ""
            except OSError as error:
                problem = error.strerror or str(error)  # an error's own text has the name of the part, always another
                if problem != self._problem:
                    log.error(
                        "%s cannot be written, a restart will not know what is changed now: %s", self.path, problem
                    )
                self._problem = problem
            with self._changed:
                self._writing = False
