# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter would load for a model, by the code that loads it, and what it would take there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.composing import NOT_A_SUM, why_no_part
from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.folder import CONFIG, WEIGHTS
from multilora_backend.adapters.inspection import Inspection, inspect_folder, reason_of
from multilora_backend.adapters.layout import numel
from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.adapters.peft_plan import AdapterPlan
from multilora_backend.adapters.pool import PoolSize
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.sources import Roots, Source
from multilora_backend.config import Config
from multilora_backend.engine import memory
from multilora_backend.errors import MultiloraError
from multilora_backend.models.fusion import base_model
from multilora_backend.models.loader import LoadedModel, outline
from multilora_backend.planning.footprint import footprint
from multilora_backend.planning.plan import Machine, adapter_memory
from multilora_backend.planning.stored import with_weights


@dataclass(frozen=True)
class Running:
    """The model as the engine would have it, without its weights, and the room for adapters."""

    config: Config
    model: LoadedModel
    base: BaseModel
    pool: PoolSize
    arena: int
    """Bytes for extras."""
    pinned: bool

    @classmethod
    def of(cls, config: Config, machine: Machine) -> Running:
        """Raises MultiloraError if the engine would not start with the model."""
        cuda = machine.device.type == "cuda"
        model = outline(config, machine.device)
        pool, _ = adapter_memory(config, model, machine)
        arena = memory.extras_arena_bytes(config, machine.total if cuda else None)
        return cls(config, model, base_model(model.module, Path(config.model)), pool, arena, cuda)


@dataclass(frozen=True)
class ModuleRoom:
    """LoRA on one module of the model."""

    module: str
    site: str
    """The linear of ours that it is, or is a part of."""
    rank: int
    scale: float
    device_bytes: int
    """Of its A and B, in the model's dtype, at the adapter's padded rank."""


@dataclass(frozen=True)
class ExtraRoom:
    kind: str
    place: str
    device_bytes: int


@dataclass
class Fit:
    model: str
    model_type: str
    dtype: str
    device: str
    fingerprint: str = ""
    """Of the model's weights, as `adapters.lineage` compares it; empty if they are not in its folder."""
    reason: str = ""
    """Why the engine would not load the adapter; empty if it would."""
    version: str = ""
    """By which `name@version` asks for this content; empty if it would not load, or was not read."""
    rank: int = 0
    """The largest of a module, and"""
    padded_rank: int = 0
    """what the pool has to hand out for it, at all linears,"""
    pool_ranks: int = 0
    """of so many."""
    pool_bytes: int = 0
    extras_bytes: int = 0
    """In the arena of what it has besides A and B,"""
    arena_bytes: int = 0
    """of so many."""
    host_bytes: int = 0
    modules: tuple[ModuleRoom, ...] = ()
    extras: tuple[ExtraRoom, ...] = ()
    tokens: dict[str, int] = field(default_factory=dict)
    """That its tokenizer adds to the model's, and their ids."""
    no_effect: bool | None = None
    """None: it would not load, or it cannot be known; see `unchecked`."""
    unchecked: str = ""
    """What could not be computed without the base model's weights; empty if nothing."""
    not_in_sums: str = ""
    """Why it cannot be part of a composition; empty if it can, or would not load."""


@dataclass(frozen=True)
class Report:
    adapter: Inspection
    fit: Fit | None = None
    """None: no model was named."""

    @property
    def reasons(self) -> list[str]:
        """Why it would not load; the engine's own comes first."""
        own = [self.fit.reason] if self.fit is not None and self.fit.reason else []
        return own + [reason for reason in self.adapter.reasons if reason not in own]


def inspect(folders: Sequence[Path], adapter_roots: str, running: Running | None) -> list[Report]:
    """In the order of `folders`. Links are followed as if `adapters` were the folder in which each lies."""
    reports = []
    for folder in folders:
        inside = Roots.for_operator(adapter_roots, str(folder.absolute().parent)).folders
        adapter = inspect_folder(folder, inside)
        reports.append(Report(adapter, None if running is None else fit(folder, inside, running)))
    return reports


def adapter_folders(folder: Path) -> list[Path]:
    """The folder itself, or, if it is none of an adapter but holds such folders, these by name."""
    if folder.is_dir() and not (folder / CONFIG).exists() and not (folder / WEIGHTS).exists():
        inner = sorted(path for path in folder.iterdir() if (path / CONFIG).is_file())
        return inner or [folder]
    return [folder]


def fit(folder: Path, inside: tuple[Path, ...], running: Running) -> Fit:
    """Raises nothing: what is wrong is the reason."""
    model, config = running.model, running.config
    found = Fit(
        model=config.model,
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        pool_ranks=running.pool.num_ranks,
        arena_bytes=running.arena,
    )
    # Without weights in the model's folder there is none, and all else is known by config.json.
    with suppress(MultiloraError, OSError):
        found.fingerprint = running.base.identity.fingerprint if running.base.identity is not None else ""
    try:
        _fit(found, folder, inside, running)
    except Exception as error:  # whatever a file does to its parser, as in the loader's threads
        found.reason = reason_of(error)
    return found


def _fit(found: Fit, folder: Path, inside: tuple[Path, ...], running: Running) -> None:
    model = running.model
    room = footprint(
        AdapterEntry(folder.name, Source.of_folder(folder, inside)),
        model.sites,
        model.dtype,
        running.pool,
        running.base,
        running.arena,
        running.pinned,
        running.config.adapter_max_bytes,
    )
    found.rank, found.reason = room.rank, room.reason
    if found.reason:
        return
    found.padded_rank, found.pool_bytes = padded(room.rank), room.device_bytes
    found.extras_bytes, found.host_bytes = room.extras_bytes, room.host_bytes
    plan = check_adapter(folder, model.sites, inside, running.base)
    found.modules, found.extras = _modules(plan, model), _extras(plan)
    found.tokens = {token.content: token.id for token in plan.tokens.tokens}
    _read(found, folder, inside, plan, running)


def _read(found: Fit, folder: Path, inside: Sequence[Path], plan: AdapterPlan, running: Running) -> None:
    """Lays the adapter out as for the device: what does not fit the dtype, or is not finite, shows here."""
    sites, dtype, base = running.model.sites, running.model.dtype, running.base
    if plan.extras:
        try:
            base = with_weights(base, plan, sites, dtype)
        except (MultiloraError, OSError) as error:
            kinds = ", ".join(sorted({spec.key[0] for spec in plan.extras}))
            found.not_in_sums = NOT_A_SUM
            found.unchecked = f"values of {kinds}, since the base model's weights are needed: {reason_of(error)}"
            return
    weights = read_adapter(folder, sites, dtype, inside=inside, base=base)
    found.version, found.no_effect = weights.version, weights.no_effect
    found.not_in_sums = why_no_part(weights, sites)


def _modules(plan: AdapterPlan, model: LoadedModel) -> tuple[ModuleRoom, ...]:
    rooms = []
    for part in plan.parts:
        site = model.sites[part.site]
        if part.expert is None:
            columns = site.in_features + site.out_features[part.slice]
            elements = padded(plan.rank) * max(site.experts, 1) * columns
        else:  # its linears share the site's ranks
            elements = numel(site, plan.rank) // (site.experts * len(site.former))
        rooms.append(ModuleRoom(part.module, site.key, part.rank, part.scale, elements * model.dtype.itemsize))
    return tuple(rooms)


def _extras(plan: AdapterPlan) -> tuple[ExtraRoom, ...]:
    return tuple(ExtraRoom(*spec.key, spec.nbytes) for spec in plan.extras)
