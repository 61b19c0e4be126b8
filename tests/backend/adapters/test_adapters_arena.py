# SPDX-License-Identifier: Apache-2.0
"""Where extras lie in their block on the host, and in the arena on the device."""

from __future__ import annotations

import pytest
import torch

from multilora_backend.adapters.extras import ExtraSpec, allocate_extras, size_of
from multilora_backend.adapters.extras_pool import ExtrasPool


def test_tensors_lie_aligned_side_by_side():
    specs = [ExtraSpec(("x", str(n)), (n,), torch.bfloat16) for n in (1, 8, 9)]
    specs.append(ExtraSpec(("y", ""), (2, 3), torch.float32))
    extras = allocate_extras(specs)
    assert list(extras.offsets.values()) == [0, 1, 2, 4]
    assert extras.size == size_of(specs) == 6 * 16 == extras.buffer.nbytes
    extras.buffer.data.zero_()
    for value, tensor in enumerate(extras.tensors.values(), 1):
        tensor.fill_(value)
    for value, spec in enumerate(specs, 1):
        tensor = extras.tensors[spec.key]
        assert tensor.dtype == spec.dtype
        assert tensor.shape == spec.shape
        assert (tensor == value).all()
    with pytest.raises(ValueError, match="occurs twice"):
        allocate_extras(specs[:1] * 2)


@pytest.mark.parametrize(("begin", "start"), [(0, 48), (48, 0), (16, 16), (0, 160)])
def test_moved_extras_are_where_the_table_says(begin: int, start: int):
    pool = ExtrasPool([("a", ""), ("b", ""), ("c", "")], 320, 2, torch.device("cpu"))
    extras = allocate_extras([ExtraSpec(("a", ""), (20,), torch.float32), ExtraSpec(("c", ""), (5,), torch.float32)])
    for i, tensor in enumerate(extras.tensors.values()):
        tensor.copy_(torch.arange(len(tensor)) + 100.0 * i)
    pool.write(extras, 1, begin)
    pool.move(1, begin, start, extras.size)
    assert pool.where[:, 1].tolist() == [start // 16, -1, start // 16 + 5]
    assert [int(pool.offsets(row)[1]) for row in range(3)] == pool.where[:, 1].tolist()
    assert pool.where[:, 0].tolist() == [-1, -1, -1]
    values = pool.values(torch.float32)[start // 4 :]
    assert values[:20].tolist() == [float(i) for i in range(20)]
    assert values[20:25].tolist() == [100.0 + i for i in range(5)]
