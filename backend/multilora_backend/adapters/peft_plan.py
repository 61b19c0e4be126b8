# SPDX-License-Identifier: Apache-2.0
"""Matches an adapter's config, the tensors of its file and the base model against each other, before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from multilora_backend.adapters.affine import AffinePart
from multilora_backend.adapters.base import EMBEDDING, HEAD, BaseModel
from multilora_backend.adapters.extras import ExtraSpec, affine_spec, size_of
from multilora_backend.adapters.found import EMBEDDING_KINDS, HEAD_KINDS, LINEAR, LORA, NORM, Found
from multilora_backend.adapters.layout import numel
from multilora_backend.adapters.norms import NormPart, plan_norms
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.targets import Target, check_parameters, parameter_modules, refusal, targets
from multilora_backend.adapters.tensors import TensorInfo
from multilora_backend.adapters.vocabulary import TablePart, plan_tables
from multilora_backend.added_tokens import NO_TOKENS, AddedTokens
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError, invalid


@dataclass(frozen=True)
class Part:
    """LoRA on one module: slice `slice` of site `site`. A is `[rank, in_features]`, B `[out_features, rank]`.

    With experts A is `[experts * rank, in_features]`, expert after expert, and B `[out_features, rank * experts]`.
    """

    module: str
    site: int
    slice: int
    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo
    expert: int | None = None
    """The one that it is for, where each has a tensor of its own; then"""
    first: int = 0
    """is the first of the site's ranks that it takes."""


@dataclass(frozen=True)
class AdapterPlan:
    """What a folder's config and header promise: all that can be known without reading the weights."""

    parts: tuple[Part, ...]
    rank: int
    """The largest of a part; 1 if there is none."""
    numel: int
    """Elements of A and B in device layout."""
    affine: tuple[AffinePart, ...] = ()
    norms: tuple[NormPart, ...] = ()
    tables: tuple[TablePart, ...] = ()
    """What is done to the embedding and to the head."""
    extras: tuple[ExtraSpec, ...] = ()
    """Tensors besides A and B."""
    tokens: AddedTokens = NO_TOKENS
    """That its tokenizer has and the base model's has not."""

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows; 0: those of the base model."""
        own = (table.vocabulary for table in self.tables if table.place == EMBEDDING and table.weight is not None)
        return next(own, 0)

    @property
    def extras_bytes(self) -> int:
        """On the device."""
        return size_of(self.extras)


def plan_adapter(
    config: PeftConfig, tensors: Mapping[str, TensorInfo], sites: Sequence[LoraSite], base: BaseModel | None
) -> AdapterPlan:
    """Raises MultiloraError unless every tensor has its place and every place that the config names its tensor.

    `base` None: the weights of the base model are not known, so what depends on them is refused.
    """
    places = {m: (i, j) for i, site in enumerate(sites) if not site.parameter for j, m in enumerate(site.modules)}
    with_lora = {*places, *parameter_modules(sites)}
    for module in with_lora:
        if config.saves(module):
            raise MultiloraError(
                ErrorCode.UNSUPPORTED, f"modules_to_save: full weights of linears ({module}) are not supported"
            )
    for field in ("modules_to_save", "trainable_token_indices"):
        if base is None and getattr(config, field):
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"{field}: needs the base model, which is not loaded")
    check_parameters(config, sites)
    kinds = _kinds(places, with_lora, base)
    found = Found(tensors, lambda module: kinds.get(_plain(module), frozenset()))
    own = targets(config, sites, found.modules)
    for (module, kind), info in found:
        if kind in LINEAR - {"bias"} and module not in own and _plain(module) in with_lora:
            raise refusal(info.name, module, sites)
    parts = _lora_parts(config, found, sites, own)
    affine = _affine_parts(config, found, parts, sites, places, base)
    norms = () if base is None else plan_norms(config, found, base)
    tables = () if base is None else plan_tables(config, found, base)
    if not parts and not any(table.has_lora for table in tables):
        raise invalid("target_modules", "names no linear of the base model, nor its embedding")
    rank = max((part.first + part.rank for part in parts), default=1)
    touched = [sites[i] for i in {part.site for part in parts}]
    extras = [affine_spec(sites[i]) for i in sorted({part.site for part in affine})]
    extras += [norm.spec for norm in norms] + [spec for table in tables for spec in table.specs]
    size = sum(numel(site, rank) for site in touched)
    return AdapterPlan(tuple(parts), rank, size, tuple(affine), norms, tables, tuple(extras))


def _plain(module: str) -> str:
    """Without what PEFT wraps around it."""
    return module.replace(".base_layer", "")


def _kinds(linears: Iterable[str], with_lora: Iterable[str], base: BaseModel | None) -> dict[str, frozenset[str]]:
    """What each module may have in the file."""
    kinds = dict.fromkeys(with_lora, LORA) | dict.fromkeys(linears, LINEAR)
    if base is not None:
        kinds |= dict.fromkeys(base.norms, NORM)
        if base.embedding is not None and base.head is not None:
            kinds |= {EMBEDDING: EMBEDDING_KINDS, HEAD: HEAD_KINDS}
    return kinds


def _lora_parts(config: PeftConfig, found: Found, sites: Sequence[LoraSite], own: Mapping[str, Target]) -> list[Part]:
    parts = []
    taken: Counter[tuple[int, int]] = Counter()
    for module, target in own.items():
        rank, site = config.rank(target.key), sites[target.site]
        ranks, width, field = rank, site.out_features[target.slice if not site.experts else 0], "target_modules"
        if target.expert is not None:
            width //= len(site.former)
        elif site.parameter:
            ranks, field = rank * max(site.experts, 1), "target_parameters"
        for name in ("use_dora", "lora_bias", "alora_invocation_tokens") if site.parameter else ():
            if getattr(config, name):
                raise MultiloraError(ErrorCode.UNSUPPORTED, f"{name}: PEFT has none on experts and routers ({module})")
        a = found.expect(module, "A", (ranks, site.in_features), field)
        b = found.expect(module, "B", (width, ranks), field)
        scale, place = config.scale(target.key), (target.site, -1 if target.expert is None else target.expert)
        parts.append(Part(module, target.site, target.slice, rank, scale, a, b, target.expert, taken[place]))
        taken[place] += rank if target.expert is not None else 0
    return parts


def _affine_parts(
    config: PeftConfig,
    found: Found,
    lora: Sequence[Part],
    sites: Sequence[LoraSite],
    places: Mapping[str, tuple[int, int]],
    base: BaseModel | None,
) -> list[AffinePart]:
    """DoRA's magnitudes, lora_B's biases and trained biases, by module in the order of the sites."""
    with_lora = {part.module: part for part in lora}
    parts = []
    for module, (i, j) in places.items():
        shape, own = (sites[i].out_features[j],), with_lora.get(module)
        part = AffinePart(
            module,
            i,
            j,
            magnitude=found.either(module, "magnitude", shape, "use_dora", config.use_dora and own is not None),
            a=None if own is None else own.a,
            b=None if own is None else own.b,
            lora_bias=found.either(module, "lora_bias", shape, "lora_bias", config.lora_bias and own is not None),
            bias=_bias(config, found, module, shape, base, i),
            scale=1.0 if own is None else own.scale,
        )
        if any(info is not None for info in (part.magnitude, part.lora_bias, part.bias)):
            if base is None:
                field = "use_dora" if part.magnitude else "lora_bias" if part.lora_bias else "bias"
                raise MultiloraError(ErrorCode.UNSUPPORTED, f"{field}: needs the base model, which is not loaded")
            parts.append(part)
    return parts


def _bias(
    config: PeftConfig, found: Found, module: str, shape: tuple[int, ...], base: BaseModel | None, site: int
) -> TensorInfo | None:
    """The module's trained bias, if the config says that it has one and the base model too."""
    targeted = config.targets(module)
    trained = config.bias == "all" or (config.bias == "lora_only" and targeted)
    biased = base is not None and base.linears[site].base_bias is not None
    info = found.either(module, "bias", shape, "bias", trained and (biased or found.get(module, "bias") is not None))
    if info is not None:
        # PEFT puts a linear with LoRA behind `base_layer`, and drops a name without it silently.
        if info.name.endswith(".base_layer.bias") != targeted:
            raise invalid(info.name, f"PEFT would not find it: {module} has {'' if targeted else 'no '}LoRA")
        if base is not None and not biased:
            raise invalid(info.name, f"the base model's {module} has no bias")
    return info
