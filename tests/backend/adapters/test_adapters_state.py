# SPDX-License-Identifier: Apache-2.0
"""What outlives the server, and a file that is broken, old, or cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapter_bench import Bench, version_of
from frontend_fakes import wait_until
from multilora_backend.adapters.statefile import Saved, SavedEntry, StateFile
from multilora_backend.errors import MultiloraError

FOLDERS = {"new": 5, "secret-one": 6}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


def start(path: Path, content: dict | None = None, **more) -> Bench:
    return Bench(content or {"a": 3, "b": 4}, more_folders=dict(FOLDERS), watched=True, state=StateFile(path), **more)


def stop(bench: Bench) -> None:
    bench.manager.poll()
    bench.manager.close()


def test_what_commands_have_done_is_known_after_a_restart(path):
    bench = start(path)
    manager = bench.manager
    manager.load("x", "new", tenants=["acme"], pinned=True)
    manager.alias("prod", "a")
    manager.alias("shop", "prod")
    manager.alias("best", "x")
    manager.unload("b")
    bench.settle()
    stop(bench)
    bench = start(path)
    manager = bench.manager
    assert manager.names() == ["a", "x"]
    assert manager.resolve("shop") == "a"
    assert manager.resolve("best", "acme") == "x"
    with pytest.raises(MultiloraError):
        manager.resolve("best")
    assert manager.resolve(f"x@{version_of('new', 5)}", "acme") == "x", "its version is known before it is read"
    assert not bench.loader.read
    assert (manager.show("x").pinned, manager.show("x").origin) == (True, "admin")
    bench.settle()
    assert manager.show("x").level == "device"
    bench.reconcile()
    assert "b" not in manager.names()


def test_versions_are_known_unless_the_files_look_otherwise(path):
    bench = start(path)
    bench.manager.alias("prod", "a")
    bench.loader.change("b", 4)
    bench.activate("a", "b")
    bench.clock.now += 2
    stop(bench)
    assert StateFile(path).read().versions["/nowhere/b"][1] == version_of("b", 4)
    bench = start(path)
    assert bench.manager.show("a").version == version_of("a", 3)
    assert bench.manager.show("b").version is None
    bench.manager.check_all()
    bench.activate("a")


def test_a_version_that_an_alias_names_outlives_its_replacement_and_the_restart(path):
    bench = start(path)
    bench.manager.load("x", "new")
    bench.settle()
    bench.manager.alias("blue", f"x@{version_of('new', 5)}")
    bench.loader.content["newer"] = 7
    bench.manager.load("x", "newer")
    bench.settle()
    stop(bench)
    bench = start(path)
    bench.loader.content["newer"] = 7
    manager = bench.manager
    blue, current = manager.resolve("blue"), manager.resolve("x")
    assert blue != current
    bench.activate(blue, current)
    assert (manager.show("blue").version, manager.show("x").version) == (version_of("new", 5), version_of("newer", 7))


def test_a_version_whose_source_has_another_content_by_now_goes_on_as_the_current_one(path):
    bench = start(path)
    bench.manager.load("x", "new")
    bench.settle()
    bench.manager.alias("blue", f"x@{version_of('new', 5)}")
    bench.loader.change("new", 7)
    bench.manager.load("x")
    bench.settle()
    assert bench.manager.resolve("x") != bench.manager.resolve("blue")
    stop(bench)
    bench = start(path)
    bench.loader.change("new", 7)
    blue = bench.manager.resolve("blue")
    bench.manager.hold(blue)
    bench.manager.request(blue)
    bench.loader.run()
    assert bench.manager.poll().moved == [(blue, bench.manager.resolve("x"))]


def test_sources_that_are_not_allowed_any_more_are_left_out_and_kept(path, caplog):
    saved = Saved(adapters=[SavedEntry("bad", "secret-one"), SavedEntry("x", "new")], aliases={"gone": "bad", "y": "x"})
    StateFile(path).write(saved)
    bench = start(path)
    assert bench.manager.names() == ["a", "b", "x"]
    assert "adapter bad of an earlier run is left out: source: 'secret-one' is not below" in caplog.text
    assert "alias gone of an earlier run is left out" in caplog.text
    bench.manager.unload("b")
    stop(bench)
    kept = StateFile(path).read()
    assert {entry.name for entry in kept.adapters} == {"bad", "x"}
    assert kept.aliases == {"y": "x"}


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"adapters": 3}', "\x00", '{"aliases": {"a": 3}}'])
def test_a_file_that_is_not_understood_is_set_aside(path, text, caplog):
    path.write_text(text)
    bench = start(path)
    assert bench.manager.names() == ["a", "b"]
    assert "is set aside as state.json.broken" in caplog.text
    assert path.with_name("state.json.broken").read_text() == text
    bench.manager.alias("prod", "a")
    stop(bench)
    assert StateFile(path).read().aliases == {"prod": "a"}


def test_reading_adapters_alone_makes_no_file(path):
    bench = start(path)
    bench.activate("a", "b")
    bench.clock.now += 10
    stop(bench)
    assert list(path.parent.iterdir()) == []


def test_a_file_that_cannot_be_written_is_reported_once_and_stops_nothing(tmp_path, caplog):
    state = StateFile(tmp_path / "no" / "such" / "folder" / "state.json")
    bench = Bench({"a": 3, "b": 4}, watched=True, state=state)
    for target in "abab":
        bench.manager.alias("prod", target)
        bench.manager.poll()
        wait_until(lambda: state.idle)
    stop(bench)
    assert bench.manager.resolve("prod") == "b"
    assert caplog.text.count("cannot be written, a restart will not know") == 1


def test_an_alias_cycle_in_the_file_is_left_out(path, caplog):
    StateFile(path).write(Saved(aliases={"x": "y", "y": "x", "z": "a"}))
    bench = start(path)
    assert bench.manager.registry.aliases == {"z": "a"}
    assert "alias x of an earlier run is left out" in caplog.text
