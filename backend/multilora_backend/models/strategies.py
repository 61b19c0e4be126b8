# SPDX-License-Identifier: Apache-2.0
"""The strategies of LoRA by name."""

from __future__ import annotations

from collections.abc import Callable

from multilora_backend.adapters.pool import DevicePool
from multilora_backend.models.bordered import Bordered
from multilora_backend.models.linear import FusedLinear
from multilora_backend.models.lora import Grouped, LoraStrategy, NoLora, Reference

STRATEGIES: dict[str, Callable[[list[FusedLinear], DevicePool], LoraStrategy]] = {
    "reference": Reference,
    "grouped": Grouped,
    "bordered": Bordered,
}


def create_strategy(name: str, linears: list[FusedLinear], pool: DevicePool | None) -> LoraStrategy:
    """One of STRATEGIES by name; `auto` is bordered on CUDA and grouped elsewhere. Without a pool LoRA is off."""
    if pool is None:
        return NoLora()
    if name == "auto":
        name = "bordered" if pool.device.type == "cuda" else "grouped"
    return STRATEGIES[name](linears, pool)
