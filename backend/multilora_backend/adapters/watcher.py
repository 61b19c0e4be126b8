# SPDX-License-Identifier: Apache-2.0
"""A thread that looks at the configured adapters now and then and hands over what is wanted, never half of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.sources import Roots
from multilora_backend.errors import MultiloraError

log = logging.getLogger(__name__)

PAUSE_EVERY = 20
"""Adapters looked at between two pauses. At 25 us each the thread lets go of the interpreter after half a millisecond,
which is what a step can lose to it; without pauses 10,000 adapters would hold it for a quarter of a second."""
PAUSE_S = 0.002
REST = 30
"""After a look the thread rests so many times as long as it has computed. 10,000 adapters take 0.3 s of a core, and so
are looked at every nine seconds at most; hundreds, every `interval_s`."""
CLOSE_TIMEOUT_S = 5.0

Entries = dict[str, AdapterEntry]


class Watcher:
    """Calls `wake` from its own thread when `take` has something new."""

    def __init__(
        self,
        adapters: str,
        roots: Roots,
        interval_s: float,
        wake: Callable[[], None],
        initial: Iterable[AdapterEntry] = (),
    ) -> None:
        """`adapters`: a folder or a file, see `Catalogue.read`. `initial`: what is served already."""
        self._adapters = adapters
        self._roots = roots
        self._interval_s = interval_s
        self._wake = wake
        self._wanted: Entries = {entry.name: entry for entry in initial}
        self._seen = dict(self._wanted)
        self._news: tuple[AdapterEntry, ...] | None = None
        self._problem = ""
        self._looked_at = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="adapter-watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    @property
    def problem(self) -> str:
        """Why the last look changed nothing; empty if it could be read."""
        return self._problem

    def take(self) -> tuple[AdapterEntry, ...] | None:
        """All that is wanted, if that is not what was taken last; else None. Costs nothing then."""
        if self._news is None:
            return None
        # A list that the thread puts here in between is newer, and is taken instead or next time.
        news, self._news = self._news, None
        return news

    def look(self) -> None:
        """One look. Raises nothing: what cannot be read leaves everything as it is."""
        try:
            catalogue = Catalogue.read(self._adapters, self._roots, self._pause)
            look = {entry.name: entry for entry in catalogue.entries}
            problem = ""
        except MultiloraError as error:
            problem = error.message
        except Exception as error:  # whatever a file does to its parser, the thread goes on looking
            problem = f"adapters: {self._adapters} cannot be read: {type(error).__name__}: {error}"
        if problem != self._problem:
            log.warning("%s; what was served is served on", problem) if problem else log.info(
                "adapters: readable again"
            )
            self._problem = problem
        if problem:
            return
        wanted = settle(self._wanted, self._seen, look)
        self._seen = look
        if wanted != self._wanted:
            self._wanted = wanted
            self._news = tuple(wanted.values())
            self._wake()

    def _watch(self) -> None:
        rest = self._interval_s
        # Event.wait counts monotonic time, so a clock that jumps changes nothing.
        while not self._stop.wait(rest):
            begin = time.thread_time()
            self.look()
            rest = max(self._interval_s, REST * (time.thread_time() - begin))

    def _pause(self) -> None:
        self._looked_at += 1
        if self._looked_at % PAUSE_EVERY == 0:
            self._stop.wait(PAUSE_S)


def settle(wanted: Entries, seen: Entries, look: Entries) -> Entries:
    """What is wanted after a look: a name came, changed or went once two looks in a row agree on it.

    So a folder that is being copied, a file that is being written and a rename in two steps are waited for. `wanted`
    is what counted so far, `seen` the look before this one. The order is the look's, what it lacks comes last.
    """
    settled = {}
    for name, entry in look.items():
        if seen.get(name) == entry:
            before = wanted.get(name)
            # What is equal stays the same object: the engine's thread has nothing to compare then.
            settled[name] = before if before is not None and before == entry else entry
        elif name in wanted:
            settled[name] = wanted[name]
    for name, entry in wanted.items():
        if name not in look and name in seen:
            settled[name] = entry
    return settled
