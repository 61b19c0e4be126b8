# SPDX-License-Identifier: Apache-2.0
"""Who gets how much of the device's memory when the operator does not say.

The arithmetic is apart from what asks the device, so that `planning` reckons as the engine does.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from multilora_backend.adapters.extras import ALIGNMENT
from multilora_backend.config import Config
from multilora_backend.errors import invalid
from multilora_backend.models.loader import LoadedModel, bytes_per_token
from multilora_backend.scheduling.host import HostPages

CPU_ADAPTER_BYTES = 256 * 2**20
CPU_KV_CACHE_BYTES = 256 * 2**20
CUDA_ADAPTER_BYTES = 8 * 2**30
CUDA_ADAPTER_SHARE = 12
"""The adapters' pool is one part in this many of the device's memory, CUDA_ADAPTER_BYTES at most."""
EXTRAS_SHARE = 16
"""The extras' arena is as large as one part in this many of the adapters' pool, and comes on top of it."""


@dataclass(frozen=True)
class DeviceMemory:
    """Of a CUDA device, in bytes."""

    total: int
    free: int
    """When weights, adapter pool and border are there."""


def adapter_bytes(device: torch.device) -> int:
    """The device pool's bytes. On 80 GB that is room for 80 adapters of rank 16 on all linears of an 8B model."""
    return default_adapter_bytes(torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None)


def default_adapter_bytes(total: int | None) -> int:
    """`total`: the CUDA device's bytes; None: the CPU."""
    return CPU_ADAPTER_BYTES if total is None else min(CUDA_ADAPTER_BYTES, total // CUDA_ADAPTER_SHARE)


def extras_bytes(config: Config, device: torch.device) -> int:
    """The arena of what adapters have besides A and B: beside 80 adapters of an 8B model, for DoRA with 48 of them."""
    return extras_arena_bytes(config, torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None)


def extras_arena_bytes(config: Config, total: int | None) -> int:
    """`total` as in `default_adapter_bytes`."""
    size = config.adapter_extras_bytes or (config.adapter_device_bytes or default_adapter_bytes(total)) // EXTRAS_SHARE
    return size // ALIGNMENT * ALIGNMENT


def num_pages(config: Config, model: LoadedModel) -> int:
    """KV pages, the trash page included, within `kv_cache_bytes`. Call it when everything else has been allocated."""
    memory = None
    if model.device.type == "cuda" and not config.kv_cache_bytes:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(model.device)
        memory = DeviceMemory(total, free)
    return pages_within(kv_cache_bytes(config, memory), bytes_per_token(model) * config.block_size)


def host_pages(config: Config, model: LoadedModel) -> HostPages:
    """Places for KV pages in host memory, as many as `kv_host_bytes` holds."""
    token = bytes_per_token(model)
    return HostPages(config.kv_host_bytes // (token * config.block_size), token)


def kv_cache_bytes(config: Config, memory: DeviceMemory | None) -> int:
    """The KV cache's budget, which may be negative. `memory` None: the CPU."""
    if config.kv_cache_bytes or memory is None:
        return config.kv_cache_bytes or CPU_KV_CACHE_BYTES
    budget = int(memory.free - (1 - config.gpu_memory_utilization) * memory.total)
    return budget if config.enforce_eager else budget - config.cuda_graph_bytes


def pages_within(budget: int, page_bytes: int) -> int:
    """Raises MultiloraError if there is no room for two pages: one is the trash page."""
    if budget < 2 * page_bytes:
        raise invalid("kv_cache_bytes", f"must be at least {2 * page_bytes} (two pages), got {budget}")
    return budget // page_bytes


def freeze_heap() -> None:
    """What exists now is looked at by no garbage collection any more: call it once, when the process is ready to serve.

    A full collection goes through every object of torch, transformers and the model: 240 to 300 ms in which no step
    runs (8B, one H200), against 3 ms for what was made since.
    """
    gc.collect()
    gc.freeze()
