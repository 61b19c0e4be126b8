# SPDX-License-Identifier: Apache-2.0
"""When it may be said that a restart would know: not while the file's thread has something to write."""

from __future__ import annotations

import threading
from pathlib import Path

from frontend_fakes import wait_until
from multilora_backend.adapters.registry import Registry
from multilora_backend.adapters.remembered import Remembered
from multilora_backend.adapters.statefile import Saved, StateFile


def test_a_change_is_written_when_the_file_has_it(tmp_path: Path):
    file = StateFile(tmp_path / "state.json")
    now = 10.0
    remembered = Remembered(file, lambda: now)
    assert remembered.written
    registry = Registry()
    registry.unloaded.add("a")
    remembered.changed()
    assert not remembered.written, "nobody has saved it yet"

    begun, go = threading.Event(), threading.Event()
    write = file.write

    def slowly(saved: Saved) -> None:
        begun.set()
        assert go.wait(10)
        write(saved)

    file.write = slowly  # type: ignore[method-assign]
    remembered.save(registry, {})
    assert not remembered.written
    assert begun.wait(10)
    assert not remembered.written, "it is being written"
    go.set()
    wait_until(lambda: remembered.written)
    assert file.read().unloaded == ["a"]
    remembered.close()


def test_a_file_that_cannot_be_written_holds_nobody_up(tmp_path: Path):
    file = StateFile(tmp_path / "nowhere" / "state.json")
    remembered = Remembered(file, lambda: 10.0)
    registry = Registry()
    registry.unloaded.add("a")
    remembered.changed()
    remembered.save(registry, {})
    wait_until(lambda: remembered.written)
    remembered.close()


def test_without_a_file_there_is_nothing_to_wait_for():
    remembered = Remembered(None, lambda: 10.0)
    remembered.changed()
    assert remembered.written
