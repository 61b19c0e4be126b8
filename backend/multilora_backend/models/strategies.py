# SPDX-License-Identifier: Apache-2.0
"""The strategies of LoRA by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from multilora_backend.adapters.pool import DevicePool
from multilora_backend.models.bordered import Bordered
from multilora_backend.models.linear import FusedLinear
from multilora_backend.models.lora import Grouped, LoraStrategy, NoLora, Reference

STRATEGIES: dict[str, Callable[[list[FusedLinear], DevicePool], LoraStrategy]] = {
    "reference": Reference,
    "grouped": Grouped,
    "bordered": Bordered,
}


def strategy_name(name: str, device: torch.device) -> str:
    """What `auto` stands for: bordered on CUDA and grouped elsewhere."""
    return name if name != "auto" else "bordered" if device.type == "cuda" else "grouped"


def create_strategy(name: str, linears: list[FusedLinear], pool: DevicePool | None) -> LoraStrategy:
    """One of STRATEGIES by name. Without a pool LoRA is off."""
    return NoLora() if pool is None else STRATEGIES[strategy_name(name, pool.device)](linears, pool)
