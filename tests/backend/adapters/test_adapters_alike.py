# SPDX-License-Identifier: Apache-2.0
"""Adapters that were trained alike share what can be known of them without their weights, and nothing else."""

from __future__ import annotations

import pytest
import torch

from multilora_backend.adapters import tensors
from multilora_backend.adapters.peft import _plan, check_adapter, read_adapter
from multilora_backend.adapters.tensors import parse_header, read_data, read_header
from multilora_backend.errors import MultiloraError


@pytest.fixture(autouse=True)
def nothing_known():
    _plan.cache_clear()


def test_the_second_of_a_kind_needs_no_plan_and_has_its_own_weights(save, sites):
    first, second = save("first", seed=0), save("second", seed=1)
    one, two = (read_adapter(folder, sites, torch.float32) for folder in (first, second))
    assert (_plan.cache_info().hits, _plan.cache_info().misses) == (1, 1)
    assert one.version != two.version
    assert not torch.equal(one.sites[0].a, two.sites[0].a)
    _plan.cache_clear()
    again = read_adapter(second, sites, torch.float32)
    assert again.version == two.version
    assert all(torch.equal(a.data, b.data) for a, b in zip(again.buffers, two.buffers, strict=True))


def test_another_config_beside_the_same_weights_is_another_plan(save, sites, change):
    folder = save()
    before = read_adapter(folder, sites, torch.float32)
    change(folder, lora_alpha=12)
    after = read_adapter(folder, sites, torch.float32)
    torch.testing.assert_close(after.sites[0].b, 2 * before.sites[0].b, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    assert after.version != before.version


def test_a_file_that_ends_early_is_refused_although_its_header_is_known(save, sites):
    good, bad = save("good"), save("bad")
    check_adapter(good, sites)
    path = bad / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for read in (check_adapter, lambda *arguments: read_adapter(*arguments, torch.float32)):
        with pytest.raises(MultiloraError, match="is truncated"):
            read(bad, sites)


def test_memory_of_one_file_serves_the_next_and_shows_nothing_of_it(save, monkeypatch):
    paths = [save(name, r=r) / "adapter_model.safetensors" for name, r in (("large", 8), ("small", 2), ("huge", 30))]

    def data_of(path):
        with path.open("rb") as file:
            header = read_header(file, "x")
            assert parse_header(header, "x")
            return read_data(file, header, "x")

    large = data_of(paths[0])
    assert large.tobytes() == paths[0].read_bytes()
    small = data_of(paths[1])
    assert small.tobytes() == paths[1].read_bytes()
    assert small.ctypes.data == large.ctypes.data
    monkeypatch.setattr(tensors, "MAX_KEPT_BYTES", 100)
    huge = data_of(paths[2])
    assert huge.tobytes() == paths[2].read_bytes()
    assert huge.ctypes.data != small.ctypes.data


def test_a_name_that_occurs_twice_in_a_header_is_no_choice_of_ours(tmp_path):
    entry = '"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    raw = f"{{{entry}, {entry}}}".encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with path.open("rb") as file:
        header = read_header(file, "f")
    with pytest.raises(MultiloraError, match=r"^f: is corrupt: .*the name 'x' occurs twice"):
        parse_header(header, "f")
