# SPDX-License-Identifier: Apache-2.0
"""Files that are missing, cut short, forged, or no files: each is refused by its name."""

from __future__ import annotations

import json
import os
import struct

import pytest

from multilora_backend.adapters.peft import check_adapter
from multilora_backend.adapters.tensors import parse_header, read_data, read_header
from multilora_backend.errors import MultiloraError
from refusals import refused


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(name, save, sites):
    folder = save()
    (folder / name).unlink()
    refused(folder, sites, f"^{name}: is missing")


def test_missing_folder(tmp_path, sites):
    refused(tmp_path / "nowhere", sites, "^folder: does not exist")


def test_pickled_weights(save, sites):
    folder = save()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, sites, "^adapter_model.bin: pickled weights")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_config_is_no_object(text, save, sites):
    folder = save()
    (folder / "adapter_config.json").write_bytes(text)
    refused(folder, sites, "^adapter_config.json: ")


def test_every_truncation_is_noticed(save, sites):
    path = save(r=1, target_modules=["o_proj"]) / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for size in [*range(12), length, 8 + length - 1, 8 + length, len(data) - 1]:
        path.write_bytes(data[:size])
        refused(path.parent, sites, "^adapter_model.safetensors: is (truncated|corrupt)")
    path.write_bytes(data + b"x")
    refused(path.parent, sites, "^adapter_model.safetensors: is corrupt")


def _header(entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


CORRUPT = {
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "no object": _header([1]),
    "no offsets": _header({"x": {"dtype": "F32", "shape": [1]}}),
    "no dtype": _header({"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
    "odd dtype": _header({"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
    "negative": _header({"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}) + bytes(4),
    "size": _header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4),
    "overlap": _header({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "xy"}) + bytes(4),
    "hole": _header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + bytes(8),
    "beyond": _header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}) + bytes(4),
    "entry": _header({"x": 3}),
    "twice": struct.pack("<Q", 15) + b'{"x":1, "x": 2}',
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_header(kind, save, sites):
    folder = save()
    (folder / "adapter_model.safetensors").write_bytes(CORRUPT[kind])
    refused(folder, sites, "^adapter_model.safetensors: is (corrupt|truncated|not a safetensors file)")


@pytest.mark.parametrize("edit", [lambda d: d[:-1], lambda d: d.replace(b"q_proj", b"k_proj"), lambda d: b""])
def test_file_that_changes_while_it_is_read(edit, save):
    path = save() / "adapter_model.safetensors"
    with path.open("rb", buffering=0) as file:
        header = read_header(file, "x")
        path.write_bytes(edit(path.read_bytes()))
        with pytest.raises(MultiloraError, match=r"^x: changed while it was read"):
            read_data(file, header, "x")


def test_header_reader_agrees_with_safetensors(save):
    from safetensors import safe_open

    path = save() / "adapter_model.safetensors"
    with path.open("rb") as file:
        tensors = parse_header(read_header(file, "x"), "x")
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(tensors)
        for name, info in tensors.items():
            assert tuple(theirs.get_slice(name).get_shape()) == info.shape


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_may_not_leave_the_folder(name, save, sites, tmp_path):
    folder = save()
    (folder / name).rename(folder / "inside")
    (folder / name).symlink_to("inside")
    assert check_adapter(folder, sites).rank == 4
    (folder / "inside").rename(tmp_path / "outside")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "outside")
    refused(folder, sites, f"^{name}: is a symbolic link that leaves")


def test_a_pipe_is_not_waited_for(save, sites):
    folder = save()
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    refused(folder, sites, "is not a regular file")
