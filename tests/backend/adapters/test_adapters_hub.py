# SPDX-License-Identifier: Apache-2.0
"""Repositories of a hub, and folders of this machine, snapshots of its cache among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalEntryNotFoundError

from file_server import FileServer, serve_files
from multilora_backend.adapters.cache import fetch
from multilora_backend.adapters.peft import read_adapter
from multilora_backend.adapters.sources import Roots, Source, parse_source
from multilora_backend.errors import ErrorCode, MultiloraError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMIT = 10**6


@pytest.fixture
def hub(monkeypatch) -> Iterator[FileServer]:
    with serve_files() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for folder in ("acme/lora", "acme/lora/fr"):
            server.files[f"{folder}/{CONFIG}"] = b"{}"
            server.files[f"{folder}/{WEIGHTS}"] = folder.encode()
        yield server


def of_hub(text: str) -> Source:
    return parse_source(text, Roots((), ("hf://acme",)), Path("/"))


def failure(source: Source, cache_dir: Path = Path("/nowhere")) -> MultiloraError:
    with pytest.raises(MultiloraError) as error:
        fetch(source, cache_dir, LIMIT)
    return error.value


@pytest.mark.parametrize("text", ["hf:acme/lora", "hf:acme/lora@main", f"hf:acme/lora@{'c' * 40}", "hf:acme/lora/fr"])
def test_repository(hub, tmp_path, text):
    source = of_hub(text)
    folder = fetch(source, tmp_path, LIMIT)
    assert (folder / WEIGHTS).read_bytes() == source.location.encode()
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, "source.json"]
    assert fetch(source, tmp_path, LIMIT) == folder
    assert hub.downloads() == 1


def test_a_commit_needs_no_network_twice(hub, tmp_path):
    source = of_hub(f"hf:acme/lora@{hub.commit}")
    folder = fetch(source, tmp_path, LIMIT)
    requests = len(hub.log)
    assert fetch(source, tmp_path, LIMIT) == folder
    assert len(hub.log) == requests


def test_both_files_are_of_one_commit(hub, tmp_path):
    old = fetch(of_hub("hf:acme/lora"), tmp_path, LIMIT)
    hub.commit = "d" * 40
    hub.files[f"acme/lora/{CONFIG}"] = b'{"r": 8}'
    new = fetch(of_hub("hf:acme/lora"), tmp_path, LIMIT)
    assert (new / CONFIG).read_bytes() == b'{"r": 8}'
    assert (old / CONFIG).read_bytes() == b"{}"
    assert all("/main/" not in line for line in hub.log if "resolve" in line)


def test_what_is_not_there(hub, tmp_path):
    for text in ("hf:acme/other", "hf:acme/lora@nobranch", "hf:acme/lora/de"):
        error = failure(of_hub(text), tmp_path)
        assert error.code is ErrorCode.NOT_FOUND
        assert error.message.startswith(text + ": ")


def test_damage_on_the_way_is_noticed_and_passes(hub, tmp_path):
    hub.garbled.add(f"acme/lora/{WEIGHTS}")
    with pytest.raises(OSError, match=r"hf:acme/lora: .*arrived damaged"):
        fetch(of_hub("hf:acme/lora"), tmp_path, LIMIT)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    hub.garbled.clear()
    assert fetch(of_hub("hf:acme/lora"), tmp_path, LIMIT)


def test_a_network_that_goes_away_half_way_is_no_missing_repository(hub, tmp_path, monkeypatch):
    def lost(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")  # the library's, which is a FileNotFoundError too

    monkeypatch.setattr(HfApi, "hf_hub_download", lost)
    with pytest.raises(OSError, match=r"^hf:acme/lora: LocalEntryNotFoundError: no connection"):
        fetch(of_hub("hf:acme/lora"), tmp_path, LIMIT)


def test_oversize_and_pickles_are_refused_before_any_download(hub, tmp_path):
    hub.files[f"acme/lora/{WEIGHTS}"] = bytes(LIMIT + 1)
    assert "adapter_max_bytes" in failure(of_hub("hf:acme/lora"), tmp_path).message
    hub.files["acme/lora/adapter_model.bin"] = hub.files.pop(f"acme/lora/{WEIGHTS}")
    assert "pickled" in failure(of_hub("hf:acme/lora"), tmp_path).message
    assert hub.downloads() == hub.downloads("adapter_model.bin") == 0


def test_a_folder_is_used_where_it_is(save):
    folder = save()
    assert fetch(Source.of_folder(folder), Path("/nowhere"), LIMIT) == folder


def test_bad_folders(save, tmp_path):
    folder = save()
    size = (folder / WEIGHTS).stat().st_size
    with pytest.raises(MultiloraError, match=f"^{WEIGHTS}: has {size} bytes or more, adapter_max_bytes allows 100"):
        fetch(Source.of_folder(folder), tmp_path, 100)
    assert failure(Source.of_folder(tmp_path / "none")).code is ErrorCode.NOT_FOUND
    assert "an adapter is a folder" in failure(Source.of_folder(folder / WEIGHTS)).message
    (tmp_path / "x.tar.gz").touch()
    assert "archives are not unpacked" in failure(Source.of_folder(tmp_path / "x.tar.gz")).message
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "pickled" in failure(Source.of_folder(folder)).message
    os.mkfifo(folder / WEIGHTS)
    assert "is not a regular file" in failure(Source.of_folder(folder)).message


def test_links_stay_inside_of_the_roots(save, sites, tmp_path):
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    allowed.mkdir()
    save().rename(outside)
    (allowed / "x").symlink_to(outside)
    assert "outside of adapter_roots" in failure(Source.of_folder(allowed / "x", (allowed,))).message
    assert fetch(Source.of_folder(allowed / "x"), tmp_path, LIMIT)
    assert fetch(Source.of_folder(allowed / "x", (allowed, outside)), tmp_path, LIMIT)
    # A folder inside, one of whose files is not.
    (allowed / "x").unlink()
    (allowed / "x").mkdir()
    (allowed / "x" / CONFIG).write_bytes((outside / CONFIG).read_bytes())
    (allowed / "x" / WEIGHTS).symlink_to(outside / WEIGHTS)
    for inside in ((), (allowed,)):
        message = failure(Source.of_folder(allowed / "x", inside)).message
        assert message == f"{WEIGHTS}: is a symbolic link that leaves the adapter's folder and all of adapter_roots"
        with pytest.raises(MultiloraError, match="symbolic link"):
            read_adapter(allowed / "x", sites, torch.float32, inside=inside)


def test_snapshots_of_a_hugging_face_cache(save, sites, tmp_path):
    repository = tmp_path / "hub" / "models--acme--lora"
    snapshot, blobs = repository / "snapshots" / ("c" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    save().rename(blobs)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    for root in (tmp_path / "hub", repository):
        source = parse_source(str(snapshot), Roots.parse(str(root)), tmp_path)
        assert fetch(source, tmp_path, LIMIT) == snapshot
        assert read_adapter(snapshot, sites, torch.float32, inside=source.inside).rank == 4
    assert "symbolic link" in failure(parse_source(str(snapshot), Roots.parse(str(snapshot)), tmp_path)).message


def test_checksum_of_a_folder(save, sites):
    folder, good = save(), "a" * 64
    with pytest.raises(MultiloraError) as error:
        read_adapter(folder, sites, torch.float32, sha256=good)
    digest = error.value.message.split()[3].rstrip(",")
    assert error.value.message == f"sha256: {WEIGHTS} has {digest}, expected {good}"
    assert read_adapter(folder, sites, torch.float32, sha256=digest).rank == 4
