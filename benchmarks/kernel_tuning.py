# SPDX-License-Identifier: Apache-2.0
"""A search for the constants at the top of each kernel's file: one constant at a time, from what they are."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kernel_cases import Case

from multilora_kernels.grouped_shrink import Blocks

BLOCK_M = "block_m"
"""Of the plan, not of a file: all kernels of a step share it."""
Value = int | tuple[int | Blocks, ...]
"""Of several constants, separated by spaces: one for all or one for each."""
CHOICES: dict[str, dict[str, Sequence[Value]]] = {
    "grouped_shrink": {
        BLOCK_M: (16, 32, 64),
        # Where the GPU has no room for them they are measured with fewer columns, as they are launched.
        "ONE_SLICE SLICES SLICES_MANY_ROWS": tuple(
            (Blocks(c, k, stages),) * 3 for c in (16, 32, 64) for k in (128, 256, 512, 1024) for stages in (3, 4)
        ),
        "SPLIT NUM_WARPS": (2, 4, 8),
    },
    "grouped_expand": {
        BLOCK_M: (16, 32, 64),
        "BLOCK_N NUM_WARPS": ((64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 4), (256, 8), (512, 8)),
    },
    "gated_activation": {
        BLOCK_M: (16, 32, 64),
        "BLOCK_N_DELTA NUM_WARPS_SMALL_M NUM_WARPS_LARGE_M": (
            *((32, 1, 1), (64, 1, 1), (64, 2, 2), (64, 4, 4), (128, 2, 2), (128, 4, 4), (128, 8, 8), (256, 4, 4)),
            (256, 8, 8),
        ),
    },
    "rope_write": {
        BLOCK_M: (16, 32, 64),
        "NUM_WARPS_SMALL_M NUM_WARPS_LARGE_M": (2, 4, 8),
    },
    "add_rmsnorm": {"VALUES_PER_WARP": (128, 256, 512, 1024)},
    "copy_blocks": {"BLOCK_WORDS": (1024, 2048, 4096, 8192), "CHUNKS": (4, 8, 16, 32), "NUM_WARPS": (4, 8)},
}
CHOICES_WITHOUT_LORA: dict[str, dict[str, Sequence[Value]]] = {
    "gated_activation": {"BLOCK_N": (512, 1024, 2048, 4096), "NUM_WARPS": (2, 4, 8)},
    "rope_write": {"VALUES_PER_PROGRAM": (256, 512, 1024, 2048), "NUM_WARPS": (1, 2, 4)},
}
"""Of the ops that are another kernel without a delta."""
FILES = {"gated_activation": "activation", "rope_write": "rope", "add_rmsnorm": "rmsnorm"}
"""Where a file is not called like its op."""

Setting = tuple[tuple[str, Value], ...]
"""Constants that differ from what they are, by name."""


@dataclass
class Tuned:
    seconds: dict[Setting, float] = field(default_factory=dict)
    """Of every setting that was tried; infinity where it does not fit the GPU."""

    @property
    def best(self) -> Setting:
        return min(self.seconds, key=lambda setting: self.seconds[setting])


def tune(case: Case, block_m: int, measure: Callable[[Case, int], float]) -> Tuned:
    """`measure(case, block_m)` in seconds at the best settings found, and at all others that were tried."""
    has_lora = case.batch.adapters > 0
    choices = CHOICES[case.op] if has_lora else CHOICES_WITHOUT_LORA.get(case.op, CHOICES[case.op])
    module = importlib.import_module(f"multilora_kernels.{FILES.get(case.op, case.op)}")
    tuned = Tuned()

    def try_setting(setting: Setting) -> None:
        if setting not in tuned.seconds:
            own = {name: value for name, value in setting if name != BLOCK_M}
            with constants(module, own):
                rows = dict(setting).get(BLOCK_M, block_m)
                assert isinstance(rows, int)
                tuned.seconds[setting] = _measure(case, rows, measure)

    try_setting(())
    for name, values in choices.items():
        others = dict(tuned.best)
        others.pop(name, None)
        for value in values:
            if value not in ((block_m,) if name == BLOCK_M else _current(module, name, block_m)):
                try_setting(tuple(sorted({**others, name: value}.items())))
    return tuned


def _measure(case: Case, block_m: int, measure: Callable[[Case, int], float]) -> float:
    from triton.runtime.errors import OutOfResources

    try:
        return measure(case, block_m)
    except OutOfResources:
        return math.inf


def _current(module: Any, names: str, block_m: int) -> tuple[Value, ...]:
    """The values of these constants, each way that they may be written."""
    found = [getattr(module, name) for name in names.split()]
    values = tuple(value[block_m] if isinstance(value, dict) else value for value in found)
    return (values, values[0]) if len(set(values)) == 1 else (values,)


@contextmanager
def constants(module: Any, settings: dict[str, Value]) -> Iterator[None]:
    """A module whose constants have these values for a while; of a table by block_m, every entry."""
    before = {}
    for names, setting in settings.items():
        split = names.split()
        values = setting if isinstance(setting, tuple) else (setting,) * len(split)
        for name, value in zip(split, values, strict=True):
            before[name] = getattr(module, name)
            setattr(module, name, dict.fromkeys(before[name], value) if isinstance(before[name], dict) else value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
