# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from file_server import FileServer, serve_files
from multilora_backend.adapters import cache, remote
from multilora_backend.adapters.cache import default_cache_dir, fetch
from multilora_backend.adapters.jobs import Job, Purpose
from multilora_backend.adapters.loader import ThreadLoader
from multilora_backend.adapters.sources import Kind, Source
from multilora_backend.errors import ErrorCode, MultiloraError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMIT = 1000


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve_files() as server:
        server.files = {f"lora/{CONFIG}": b"{}", f"lora/{WEIGHTS}": b"weights"}
        yield server


@pytest.fixture
def source(server) -> Source:
    return Source(Kind.URL, f"{server.url}/lora")


def content(folder: Path) -> tuple[bytes, bytes]:
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


def refused(source: Source, cache_dir: Path, code: ErrorCode = ErrorCode.INVALID_ARG) -> str:
    with pytest.raises(MultiloraError) as error:
        fetch(source, cache_dir, LIMIT)
    assert error.value.code is code
    assert not leftovers(cache_dir)
    return error.value.message


def leftovers(cache_dir: Path) -> list[Path]:
    return list(cache_dir.rglob(".part-*"))


def test_is_downloaded_once_and_again_when_it_changes(server, source, tmp_path):
    first = fetch(source, tmp_path, LIMIT)
    assert content(first) == (b"{}", b"weights")
    assert fetch(source, tmp_path, LIMIT) == first
    assert server.downloads() == 1
    server.files[f"lora/{WEIGHTS}"] = b"others!"
    second = fetch(source, tmp_path, LIMIT)
    assert second != first
    assert content(second) == (b"{}", b"others!")
    # Whoever is reading the first is not disturbed; what is older than that is gone.
    assert content(first) == (b"{}", b"weights")
    server.files[f"lora/{WEIGHTS}"] = b"third"
    fetch(source, tmp_path, LIMIT)
    assert not first.exists()
    assert second.exists()
    server.files[f"lora/{WEIGHTS}"] = b"others!"
    assert fetch(source, tmp_path, LIMIT) == second
    assert server.downloads() == 3


def test_a_damaged_copy_is_replaced(server, source, tmp_path):
    folder = fetch(source, tmp_path, LIMIT)
    for damage in (
        lambda: (folder / WEIGHTS).write_bytes(b"weightz"),
        lambda: (folder / CONFIG).unlink(),
        lambda: (folder / "source.json").write_text("{"),
    ):
        damage()
        assert content(fetch(source, tmp_path, LIMIT)) == (b"{}", b"weights")
    assert server.downloads() == 4
    assert not leftovers(tmp_path)


def test_without_a_tag_nobody_knows_so_it_comes_again(server, source, tmp_path):
    server.tags = False
    assert fetch(source, tmp_path, LIMIT) == fetch(source, tmp_path, LIMIT)
    server.files[f"lora/{WEIGHTS}"] = b"others!"
    assert content(fetch(source, tmp_path, LIMIT))[1] == b"others!"
    assert server.downloads() == 3


def test_while_the_server_is_away_the_last_copy_is_used(server, source, tmp_path, caplog):
    server.status = 503
    with pytest.raises(OSError, match="503"):
        fetch(source, tmp_path, LIMIT)
    server.status = 0
    folder = fetch(source, tmp_path, LIMIT)
    server.status = 503
    assert fetch(source, tmp_path, LIMIT) == folder
    assert "the copy of before is used" in caplog.text
    (folder / WEIGHTS).write_bytes(b"weightz")
    with pytest.raises(OSError, match="503"):
        fetch(source, tmp_path, LIMIT)


def test_nobody_listens(tmp_path):
    with pytest.raises(OSError, match=r"^http://127\.0\.0\.1:9/lora: Client"):
        fetch(Source(Kind.URL, "http://127.0.0.1:9/lora"), tmp_path, LIMIT)


@pytest.mark.parametrize("lengths", [True, False])
def test_oversize(server, source, tmp_path, lengths):
    server.lengths = lengths
    server.files[f"lora/{WEIGHTS}"] = bytes(LIMIT + 1)
    assert refused(source, tmp_path) == f"{WEIGHTS}: has {LIMIT + 1} bytes or more, adapter_max_bytes allows {LIMIT}"
    assert bool(server.downloads()) == (not lengths)
    server.files[f"lora/{WEIGHTS}"] = bytes(LIMIT)
    assert fetch(source, tmp_path, LIMIT)


def test_breaks_off_and_leaves_nothing(server, source, tmp_path):
    server.cut[f"lora/{WEIGHTS}"] = 3
    with pytest.raises(OSError, match="http://"):
        fetch(source, tmp_path, LIMIT)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    server.cut.clear()
    assert content(fetch(source, tmp_path, LIMIT))[1] == b"weights"


def test_disappears_half_way(server, source, tmp_path, monkeypatch):
    def vanish(self, name, target, limit, download=remote.UrlRemote.download):
        download(self, name, target, limit)
        server.files.pop(f"lora/{WEIGHTS}", None)

    monkeypatch.setattr(remote.UrlRemote, "download", vanish)
    assert "does not exist" in refused(source, tmp_path, ErrorCode.NOT_FOUND)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_gone_source_is_not_served_from_the_cache(server, source, tmp_path):
    fetch(source, tmp_path, LIMIT)
    server.files.clear()
    assert refused(source, tmp_path, ErrorCode.NOT_FOUND) == f"{source.text}: has no {CONFIG}"


def test_pickles_are_refused(server, source, tmp_path):
    server.files = {f"lora/{CONFIG}": b"{}", "lora/adapter_model.bin": b"cos\nsystem"}
    assert "pickled weights can run code" in refused(source, tmp_path, ErrorCode.UNSUPPORTED)
    assert server.downloads("adapter_model.bin") == 0


def test_only_what_an_adapter_needs_is_downloaded(server, source, tmp_path):
    server.files |= {"lora/evil.py": b"!", "lora/adapter_model.bin": b"!"}
    folder = fetch(source, tmp_path, LIMIT)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, "source.json"]


def test_checksums(server, source, tmp_path):
    good, bad = hashlib.sha256(b"weights").hexdigest(), "0" * 64
    assert refused(replace(source, sha256=bad), tmp_path) == f"sha256: {WEIGHTS} has {good}, expected {bad}"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert fetch(replace(source, sha256=good), tmp_path, LIMIT)
    assert refused(replace(source, sha256=bad), tmp_path).startswith("sha256: ")
    assert server.downloads() == 2


def test_many_at_once_get_one_whole_copy(server, source, tmp_path):
    got: list[Path] = []
    threads = [threading.Thread(target=lambda: got.append(fetch(source, tmp_path, LIMIT))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 6
    assert len(set(got)) == 1
    assert content(got[0]) == (b"{}", b"weights")
    assert not leftovers(tmp_path)


def test_a_download_that_is_not_published_yet_is_nobodys(server, source, tmp_path):
    folder = fetch(source, tmp_path, LIMIT)
    folder.rename(folder.with_name(".part-x"))
    assert fetch(source, tmp_path, LIMIT) == folder
    assert server.downloads() == 2


def test_what_a_killed_download_left_is_cleared_away(source, tmp_path):
    place = fetch(source, tmp_path, LIMIT).parent
    for name, age in (("dead", cache.STALE_S + 60), ("live", 0)):
        part = place / f".part-{name}"
        part.mkdir()
        (part / WEIGHTS).touch()
        for path in (part / WEIGHTS, part):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    for path in place.glob("*/source.json"):
        path.unlink()
    fetch(source, tmp_path, LIMIT)
    assert [part.name for part in leftovers(tmp_path)] == [".part-live"]


def test_any_file_system_of_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/here/{CONFIG}": b"{}", f"/here/{WEIGHTS}": b"weights"})
    try:
        assert content(fetch(Source(Kind.URL, "memory://here"), tmp_path, LIMIT)) == (b"{}", b"weights")
    finally:
        memory.rm("/here", recursive=True)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs")])
def test_a_driver_that_is_not_installed_is_named(scheme, extra, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    message = refused(Source(Kind.URL, f"{scheme}://b/x"), tmp_path, ErrorCode.UNSUPPORTED)
    assert message == f"source: {scheme}:// cannot be read, Install it: pip install 'multilora[{extra}]'"


def test_a_slow_download_keeps_nobody_waiting_who_needs_none(tmp_path):
    go = threading.Event()

    def locate(source: Source) -> Path:
        assert source.is_local or go.wait(20)
        return tmp_path

    loader = ThreadLoader(lambda *_: None, lambda *_: None, threads=1, on_change=lambda: None, locate=locate)
    far, near = Source(Kind.URL, "https://h/x"), Source.of_folder(tmp_path)
    for key, source in (("far", far), ("far too", far), ("near", near)):
        loader.submit(Job(key, source, Purpose.DEVICE))
    deadline = time.monotonic() + 20
    while not (outcomes := loader.finished()) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [outcome.job.key for outcome in outcomes] == ["near"]
    go.set()
    assert loader.wait_idle(20)
    assert [outcome.job.key for outcome in loader.finished()] == ["far", "far too"]
    loader.close()


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "multilora" / "adapters"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert default_cache_dir() == Path("/home/x/.cache/multilora/adapters")
