# SPDX-License-Identifier: Apache-2.0
"""What fits, before anything is allocated: from config files and safetensors headers, by the engine's own arithmetic.

On the CPU the figures are those of a start to the byte. On CUDA so are weights, adapter pool and border; the KV pages
are what is left of the device, so they are as good as what is assumed of CUDA_CONTEXT_BYTES.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from multilora_backend.adapters.base_files import weight_files
from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.pool import PoolSize
from multilora_backend.adapters.sources import Roots
from multilora_backend.adapters.tensors import parse_header, read_header
from multilora_backend.config import Config
from multilora_backend.engine import memory
from multilora_backend.errors import MultiloraError, invalid
from multilora_backend.models.bordered import border_ranks
from multilora_backend.models.fusion import base_model, linears
from multilora_backend.models.loader import LoadedModel, bytes_per_token, outline
from multilora_backend.models.strategies import strategy_name
from multilora_backend.planning.footprint import Footprint, RankRow, by_rank, footprint

CUDA_CONTEXT_BYTES = 600 * 2**20
"""Assumed, not measured, of a device of stated size: what the driver, cuBLAS and torch's rounding take."""


@dataclass(frozen=True)
class Machine:
    """Where the model is to run."""

    device: torch.device
    total: int = 0
    """Bytes of a CUDA device."""
    free: int = 0
    """Before anything of ours is there."""


@dataclass(frozen=True)
class Plan:
    """Bytes, unless a name says otherwise."""

    model: str
    model_type: str
    device: str
    dtype: str
    device_bytes: int
    """Of the whole device; 0 on the CPU."""
    stored_weights: int
    """Of the safetensors files."""
    weights: int
    adapter_pool: int
    """On the device, with the staging buffer."""
    adapter_extras: int
    """On the device: the arena of what adapters have besides A and B."""
    border: int
    cuda_graphs: int
    kv_cache: int
    unassigned: int
    """What `gpu_memory_utilization` leaves for activations and workspaces; 0 on the CPU."""
    bytes_per_token: int
    kv_pages: int
    """Of `block_size` tokens, that sequences can have."""
    kv_tokens: int
    max_model_len: int
    """Prompt and output tokens of one sequence."""
    ranks: int
    """Of the device pool."""
    max_loras: int
    """Different adapters in one step; 0: as many as the pool holds."""
    host_budget: int
    by_rank: tuple[RankRow, ...]
    adapters: tuple[Footprint, ...]
    problem: str
    """Why the engine would not start; empty if it would."""

    @property
    def served(self) -> list[Footprint]:
        return [each for each in self.adapters if not each.reason]

    @property
    def refused(self) -> list[Footprint]:
        return [each for each in self.adapters if each.reason]


def machine_of(config: Config, device_bytes: int = 0) -> Machine:
    """This machine, or one with a CUDA device of `device_bytes`.

    Raises MultiloraError if that contradicts `device`, or if it is cuda and neither stated nor there.
    """
    if device_bytes:
        if config.device == "cpu":
            raise invalid("device-memory", "is a CUDA device's, and device is cpu")
        return Machine(torch.device("cuda"), device_bytes, max(0, device_bytes - CUDA_CONTEXT_BYTES))
    if config.device != "cpu" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Machine(torch.device("cuda"), total, free)
    if config.device == "cuda":
        raise invalid("device-memory", "is needed: torch sees no CUDA device here")
    return Machine(torch.device("cpu"))


def make_plan(config: Config, machine: Machine) -> Plan:
    """Raises MultiloraError for what the engine would not start with, but for a lack of KV memory: see `problem`."""
    cuda = machine.device.type == "cuda"
    model = outline(config, machine.device)
    weights = _nbytes(model.module)
    pool, border = adapter_memory(config, model, machine)
    arena = memory.extras_arena_bytes(config, machine.total if cuda else None) if config.lora_enabled else 0
    free = machine.free - weights - pool.nbytes - arena - border
    budget = memory.kv_cache_bytes(config, memory.DeviceMemory(machine.total, free) if cuda else None)
    page_bytes = bytes_per_token(model) * config.block_size
    pages, problem = 0, ""
    try:
        pages = memory.pages_within(budget, page_bytes)
    except MultiloraError as error:
        problem = error.message
    graphs = config.cuda_graph_bytes if cuda and not config.enforce_eager else 0
    unassigned = free - graphs - pages * page_bytes if cuda else 0
    if unassigned < 0 and not problem:
        problem = f"kv_cache_bytes: {pages * page_bytes} are {-unassigned} more than the device has left"
    tokens = max(0, pages - 1) * config.block_size
    common = model.sites, model.dtype, pool
    roots = Roots.for_operator(config.adapter_roots, config.adapters)
    entries = Catalogue.read(config.adapters, roots).entries if config.lora_enabled else ()
    limit = config.adapter_max_bytes
    base = base_model(model.module, Path(config.model))
    footprints = tuple(footprint(entry, *common, base, arena, pinned=cuda, max_bytes=limit) for entry in entries)
    rows = by_rank(footprints, *common, config.adapter_host_bytes, pinned=cuda) if config.lora_enabled else []
    return Plan(
        model=config.model,
        model_type=model.config.model_type,
        device=machine.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        device_bytes=machine.total,
        stored_weights=_stored_bytes(Path(config.model)),
        weights=weights,
        adapter_pool=pool.nbytes,
        adapter_extras=arena,
        border=border,
        cuda_graphs=graphs,
        kv_cache=pages * page_bytes,
        unassigned=max(0, unassigned),
        bytes_per_token=bytes_per_token(model),
        kv_pages=max(0, pages - 1),
        kv_tokens=tokens,
        max_model_len=min(model.max_model_len, tokens),
        ranks=pool.num_ranks if config.lora_enabled else 0,
        max_loras=config.max_loras,
        host_budget=config.adapter_host_bytes if config.lora_enabled else 0,
        by_rank=tuple(rows),
        adapters=footprints,
        problem=problem,
    )


def adapter_memory(config: Config, model: LoadedModel, machine: Machine) -> tuple[PoolSize, int]:
    """The device pool, and the bytes of the border, which the model has grown by when this returns."""
    if not config.lora_enabled:
        return PoolSize(0, 0, 0), 0
    cuda = machine.device.type == "cuda"
    budget = config.adapter_device_bytes or memory.default_adapter_bytes(machine.total if cuda else None)
    pool = PoolSize.within(budget, model.sites, model.dtype, cuda)
    before = _nbytes(model.module)
    if strategy_name(config.lora_strategy, machine.device) == "bordered":
        for linear in linears(model.module):
            linear.add_border(border_ranks(pool.num_ranks))
    return pool, _nbytes(model.module) - before


def _nbytes(module: nn.Module) -> int:
    """Tied weights count once."""
    return sum(tensor.nbytes for tensor in {*module.parameters(), *module.buffers()})


def _stored_bytes(folder: Path) -> int:
    """Of the files that transformers would read; checks their headers. Raises MultiloraError if one is not whole."""
    total = 0
    for path in weight_files(folder):
        with path.open("rb") as file:
            header = read_header(file, path.name)
        parse_header(header, path.name)  # raises if a part of the file is missing
        total += header.file_size
    return total
