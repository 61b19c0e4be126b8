# SPDX-License-Identifier: Apache-2.0
"""The folder where front ends meet: who leads, who is the last, and what becomes of folders that nobody needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from multilora_backend.config import Config
from multilora_backend.errors import MultiloraError
from multilora_backend.frontend import runtime
from multilora_backend.frontend.runtime import RuntimeFolder, find, folder_for


@pytest.fixture
def short_path() -> Iterator[Path]:
    """For folders with a socket, whose path may not be as long as tmp_path's can be."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_runtime_folder_that_others_may_write_to_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(MultiloraError, match=r"runtime_dir: .* this user alone"):
        RuntimeFolder(tmp_path / "x-y")


def test_a_path_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(MultiloraError, match="runtime_dir: is too long"):
        RuntimeFolder(tmp_path / ("x" * 100))


def test_folders_of_dead_servers_are_swept_and_those_of_living_ones_are_not(short_path):
    base = short_path / "base"
    dead, alive = RuntimeFolder(base / "1-dead"), RuntimeFolder(base / "2-alive")
    dead.leave(remove=False)
    third = RuntimeFolder(base / "3-new")
    assert sorted(path.name for path in base.iterdir()) == ["2-alive", "3-new"]
    assert alive.try_lead()
    for folder in (alive, third):
        assert folder.last()
        folder.leave(remove=True)
    assert not any(base.iterdir())


def test_what_another_sweeps_meanwhile_is_no_error(short_path, monkeypatch):
    base = short_path / "base"
    for folder in [RuntimeFolder(base / name) for name in ("1-dead", "2-dead")]:
        folder.leave(remove=False)
    lock = runtime._lock

    def lock_late(path: Path, kind: int) -> int | None:
        if path.parent.name == "1-dead":
            shutil.rmtree(path.parent)
        return lock(path, kind)

    monkeypatch.setattr(runtime, "_lock", lock_late)
    RuntimeFolder(base / "3-new")
    assert [path.name for path in base.iterdir()] == ["3-new"]


def test_one_leads_and_the_last_of_several_knows(short_path):
    first, second = (RuntimeFolder(short_path / "base" / "1-m") for _ in range(2))
    assert first.try_lead()
    assert first.try_lead()
    assert not second.try_lead()
    assert not first.last()
    first.leave(remove=False)
    assert second.try_lead()
    assert second.last()


def test_the_folder_is_one_models_of_one_server(tmp_path):
    config = Config(runtime_dir=str(tmp_path))
    here = folder_for(config, "multilora", "1", os.getpid())
    assert here == folder_for(config, "multilora", "1", os.getpid())
    others = {
        folder_for(Config(runtime_dir=str(tmp_path), max_num_seqs=3), "multilora", "1", os.getpid()),
        folder_for(config, "other/../x", "1", os.getpid()),
        folder_for(config, "multilora", "2", os.getpid()),
        folder_for(config, "multilora", "1", os.getppid()),
    }
    assert len(others | {here}) == 5
    assert all(path.parent == tmp_path for path in others)


def test_folders_are_found_by_model_and_server_the_highest_version_first(short_path):
    base, pid = short_path / "base", os.getpid()
    config = Config(model="m", runtime_dir=str(base))
    folders = {}
    for model, version in (("llama", "9"), ("llama", "10"), ("other", "1")):
        folders[version] = RuntimeFolder(folder_for(config, model, version, pid))
        folders[version].announce(model, version, pid)
    assert find(str(base), "llama", pid) == [folders["10"].path, folders["9"].path]
    assert find(str(base), "llama", os.getppid()) == []
    assert find(str(short_path / "nowhere"), "llama", pid) == []
    # A server of another container may have this pid, and the same temporary folder.
    served = folders["10"].path / "served.json"
    served.write_text(served.read_text().replace('"server": "', '"server": "7'))
    (folders["9"].path / "served.json").write_text("{")
    assert find(str(base), "llama", pid) == []


def test_a_folder_that_others_may_write_to_is_not_trusted(short_path):
    base = short_path / "base"
    folder = RuntimeFolder(base / f"{os.getpid()}-m")
    folder.announce("m", "1", os.getpid())
    assert find(str(base), "m", os.getpid()) == [folder.path]
    base.chmod(0o777)
    assert find(str(base), "m", os.getpid()) == []
