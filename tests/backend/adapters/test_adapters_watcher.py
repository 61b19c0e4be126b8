# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.adapters import watcher as watcher_module
from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.sources import Roots, Source
from multilora_backend.adapters.watcher import Watcher, settle


def adapter(folder: Path, content: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(content)
    return folder


class Looks:
    """A watcher that looks when it is told to, after some time in which nothing happened."""

    def __init__(self, adapters: Path, adapter_roots: str = "") -> None:
        roots = Roots.for_operator(adapter_roots, str(adapters))
        self.wakes = 0
        initial = Catalogue.read(str(adapters), roots).entries
        self.watcher = Watcher(str(adapters), roots, 3600, self.wake, initial)

    def wake(self) -> None:
        self.wakes += 1

    def look(self, times: int = 1) -> list[str] | None:
        for _ in range(times):
            self.watcher.look()
        taken = self.watcher.take()
        return None if taken is None else [entry.name for entry in taken]


def test_nothing_new_is_no_news(tmp_path):
    adapter(tmp_path / "a")
    looks = Looks(tmp_path)
    assert looks.look(3) is None
    assert looks.wakes == 0


def test_adapters_come_change_and_go(tmp_path):
    adapter(tmp_path / "b")
    looks = Looks(tmp_path)
    adapter(tmp_path / "a")
    assert looks.look() is None
    assert looks.look() == ["a", "b"]
    assert looks.look() is None
    adapter(tmp_path / "b", '{"r": 8}')
    assert looks.look() is None
    looks.watcher.look()
    before, after = Catalogue.read(str(tmp_path)).entries, looks.watcher.take()
    assert after == before
    shutil.rmtree(tmp_path / "a")
    assert looks.look(2) == ["b"]
    assert looks.wakes == 3


def test_what_is_being_copied_is_waited_for(tmp_path):
    adapter(tmp_path / "a")
    looks = Looks(tmp_path)
    for size in range(1, 5):
        adapter(tmp_path / "new")
        (tmp_path / "new" / "adapter_model.safetensors").write_bytes(bytes(size))
        (tmp_path / "a" / "adapter_model.safetensors").write_bytes(bytes(size))
        assert looks.look() is None
    assert looks.look() == ["a", "new"]


def test_a_folder_replaced_in_two_steps_is_never_missed(tmp_path):
    adapter(tmp_path / "a")
    adapter(tmp_path / "staged", '{"r": 8}')
    looks = Looks(tmp_path)
    (tmp_path / "a").rename(tmp_path / ".old")
    assert looks.look() is None
    (tmp_path / "staged").rename(tmp_path / "a")
    assert looks.look() is None
    assert looks.look() == ["a"]


def test_a_file_with_an_error_changes_nothing_and_says_so(tmp_path, caplog):
    file = tmp_path / "adapters.yaml"
    file.write_text("a: a\nb: b\n")
    looks = Looks(file)
    for text, said in (
        ("a: [", "adapters.yaml"),
        ("a: a\na: b", "'a' occurs twice"),
        ("a: hf:acme/lora", "not below any of adapter_roots"),
        ("a: a\n../x: b", "must not contain"),
        ("a: {source: a, pinned: perhaps}", "pinned must be true or false"),
    ):
        file.write_text(text)
        assert looks.look(3) is None
        assert said in looks.watcher.problem
        assert caplog.text.count(looks.watcher.problem) == 1
    file.unlink()
    assert looks.look(2) is None
    assert "cannot be read: No such file" in looks.watcher.problem
    file.write_text("b: b\nc: c\n")
    assert looks.look(2) == ["b", "c"]
    assert looks.watcher.problem == ""
    # Cut off where it still is YAML: that is not what two looks see.
    file.write_text("b: b\n")
    looks.watcher.look()
    file.write_text("b: b\nc: c\nd: d\n")
    assert looks.look(2) == ["b", "c", "d"]


def test_a_mounted_config_map_swaps_its_link(tmp_path):
    for version, text in (("v1", "a: a\n"), ("v2", "b: b\n")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "adapters.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "adapters.yaml").symlink_to("..data/adapters.yaml")
    looks = Looks(tmp_path / "adapters.yaml")
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").rename(tmp_path / "..data")
    assert looks.look(2) == ["b"]


def test_fields_of_an_entry_are_changes(tmp_path):
    file = tmp_path / "adapters.yaml"
    file.write_text("a: {source: a}")
    looks = Looks(file)
    file.write_text("a: {source: a, pinned: true, tenants: [x]}")
    looks.watcher.look()
    looks.watcher.look()
    (entry,) = looks.watcher.take()
    assert entry.pinned
    assert entry.tenants == ("x",)


def test_whatever_goes_wrong_the_thread_goes_on(tmp_path, monkeypatch):
    looks = Looks(tmp_path)
    monkeypatch.setattr(Catalogue, "read", lambda *args: 1 / 0)
    assert looks.look() is None
    assert "ZeroDivisionError" in looks.watcher.problem


def test_thread_wakes_the_engine_and_ends(tmp_path):
    woken = threading.Event()
    watcher = Watcher(str(tmp_path), Roots.for_operator("", str(tmp_path)), 0.01, woken.set)
    watcher.start()
    adapter(tmp_path / "a")
    assert woken.wait(10)
    assert [entry.name for entry in watcher.take()] == ["a"]
    watcher.close()
    assert not watcher._thread.is_alive()
    Watcher(str(tmp_path), Roots(), 1, woken.set).close()


def test_clock_jumps_do_not_matter(tmp_path, monkeypatch):
    woken = threading.Event()
    watcher = Watcher(str(tmp_path), Roots.for_operator("", str(tmp_path)), 0.01, woken.set)
    times = iter([2e9, 0.0, 1e9] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(times))
    watcher.start()
    folder = adapter(tmp_path / "a")
    assert woken.wait(10)
    watcher.take()
    woken.clear()
    # Also a file from the future, or from before the last one, is another file.
    os.utime(folder / "adapter_config.json", (0, 0))
    assert woken.wait(10)
    watcher.close()


def test_many_adapters_are_looked_at_in_pieces(tmp_path, monkeypatch):
    for i in range(65):
        adapter(tmp_path / f"a{i}")
    looks = Looks(tmp_path)
    pauses = []
    monkeypatch.setattr(looks.watcher._stop, "wait", pauses.append)
    looks.look()
    assert pauses == [watcher_module.PAUSE_S] * 3


names = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1, 2]), max_size=4)


def entries(look: dict[str, int]) -> dict[str, AdapterEntry]:
    return {name: AdapterEntry(name, Source.of_folder(Path(f"/{version}"))) for name, version in look.items()}


@given(st.lists(names, min_size=1, max_size=12))
def test_whatever_counts_was_seen_twice_in_a_row(history):
    wanted, seen = {}, {}
    for look in map(entries, history):
        before, wanted = wanted, settle(wanted, seen, look)
        for name in set(look) | set(seen) | set(before):
            if look.get(name) == seen.get(name):
                assert wanted.get(name) == look.get(name)
            else:
                assert wanted.get(name) == before.get(name)
        seen = look
    assert settle(wanted, seen, seen) == seen
    assert list(settle(wanted, seen, seen)) == list(seen)


def test_take_gives_the_newest_only_once(tmp_path):
    looks = Looks(tmp_path)
    adapter(tmp_path / "a")
    looks.watcher.look()
    looks.watcher.look()
    adapter(tmp_path / "b")
    assert looks.look(2) == ["a", "b"]
    assert looks.watcher.take() is None
