# SPDX-License-Identifier: Apache-2.0
"""Who gets how much of the device's memory when the operator does not say."""

from __future__ import annotations

import torch

from multilora_backend.config import Config
from multilora_backend.errors import invalid
from multilora_backend.models.loader import LoadedModel, bytes_per_token

CPU_ADAPTER_BYTES = 256 * 2**20
CPU_KV_CACHE_BYTES = 256 * 2**20
CUDA_ADAPTER_BYTES = 8 * 2**30
CUDA_ADAPTER_SHARE = 12
"""The adapters' pool is one part in this many of the device's memory, CUDA_ADAPTER_BYTES at most."""
EXTRAS_SHARE = 16
"""The extras' arena is as large as one part in this many of the adapters' pool, and comes on top of it."""


def adapter_bytes(device: torch.device) -> int:
    """The device pool's bytes. On 80 GB that is room for 80 adapters of rank 16 on all linears of an 8B model."""
    if device.type != "cuda":
        return CPU_ADAPTER_BYTES
    return min(CUDA_ADAPTER_BYTES, torch.cuda.mem_get_info(device)[1] // CUDA_ADAPTER_SHARE)


def extras_bytes(config: Config, device: torch.device) -> int:
    """The arena of what adapters have besides A and B: beside 80 adapters of an 8B model, for DoRA with 48 of them."""
    pool = config.adapter_device_bytes or adapter_bytes(device)
    return config.adapter_extras_bytes or pool // EXTRAS_SHARE


def num_pages(config: Config, model: LoadedModel) -> int:
    """KV pages, the trash page included, within `kv_cache_bytes`. Call it when everything else has been allocated."""
    budget = config.kv_cache_bytes
    if not budget:
        budget = CPU_KV_CACHE_BYTES
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(model.device)
            budget = int(free - (1 - config.gpu_memory_utilization) * total)
            if not config.enforce_eager:
                budget -= config.cuda_graph_bytes
    page_bytes = bytes_per_token(model) * config.block_size
    if budget < 2 * page_bytes:
        raise invalid("kv_cache_bytes", f"must be at least {2 * page_bytes} (two pages), got {budget}")
    return budget // page_bytes
