# SPDX-License-Identifier: Apache-2.0
"""Matches an adapter's config, the tensors of its file and the base model against each other, before any is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from multilora_backend.adapters.affine import AffinePart
from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.extras import ExtraSpec, affine_spec, size_of
from multilora_backend.adapters.layout import numel
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.tensors import DTYPES, TensorInfo
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?:(?P<A>lora_A(?:\.default)?\.weight)"
    r"|(?P<B>lora_B(?:\.default)?\.weight)"
    r"|(?P<lora_bias>lora_B(?:\.default)?\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
    r"|(?P<bias>(?:base_layer\.)?bias))"
)

Found = Mapping[tuple[str, str], TensorInfo]
"""The file's tensors by (module, group of _NAME)."""


@dataclass(frozen=True)
class Part:
    """LoRA on one module: slice `slice` of site `site`. A is `[rank, in_features]`, B `[out_features, rank]`."""

    module: str
    site: int
    slice: int
    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class AdapterPlan:
    """What a folder's config and header promise: all that can be known without reading the weights."""

    parts: tuple[Part, ...]
    rank: int
    """The largest of a part."""
    numel: int
    """Elements of A and B in device layout."""
    affine: tuple[AffinePart, ...] = ()
    extras: tuple[ExtraSpec, ...] = ()
    """Tensors besides A and B."""

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
    places = {m: (i, j) for i, site in enumerate(sites) for j, m in enumerate(site.modules)}
    found = _find(config, tensors, places)
    parts = _lora_parts(config, found, sites, places)
    affine = _affine_parts(config, found, parts, sites, places, base)
    rank = max(part.rank for part in parts)
    touched = [sites[i] for i in {part.site for part in parts}]
    extras = tuple(affine_spec(sites[i]) for i in sorted({part.site for part in affine}))
    return AdapterPlan(tuple(parts), rank, sum(numel(site, rank) for site in touched), tuple(affine), extras)


def _find(
    config: PeftConfig, tensors: Mapping[str, TensorInfo], places: Mapping[str, tuple[int, int]]
) -> dict[tuple[str, str], TensorInfo]:
    found: dict[tuple[str, str], TensorInfo] = {}
    for name, info in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise MultiloraError(
                ErrorCode.UNSUPPORTED,
                f"{name}: is no LoRA weight, magnitude or bias of a linear; embeddings and full weights are not "
                "supported yet",
            )
        module, kind = match["module"], str(match.lastgroup)
        if module not in places:
            raise invalid(name, f"the base model has no linear {module} that LoRA can act on")
        if kind != "bias" and not config.targets(module):
            raise invalid(name, f"target_modules of adapter_config.json does not name {module}")
        if info.dtype not in DTYPES:
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"{name}: dtype {info.dtype} is not supported")
        if found.setdefault((module, kind), info) is not info:
            raise invalid(name, "occurs twice, with and without the adapter's name")
    return found


def _lora_parts(
    config: PeftConfig, found: Found, sites: Sequence[LoraSite], places: Mapping[str, tuple[int, int]]
) -> list[Part]:
    parts = []
    for module, (i, j) in places.items():
        if config.targets(module):
            rank, site = config.rank(module), sites[i]
            a = _expect(found, module, "A", (rank, site.in_features), "target_modules")
            b = _expect(found, module, "B", (site.out_features[j], rank), "target_modules")
            parts.append(Part(module, i, j, rank, config.scale(module), a, b))
    if not parts:
        raise invalid("target_modules", "names no linear of the base model")
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
            magnitude=_either(found, module, "magnitude", shape, "use_dora", config.use_dora and own is not None),
            a=None if own is None else own.a,
            b=None if own is None else own.b,
            lora_bias=_either(found, module, "lora_bias", shape, "lora_bias", config.lora_bias and own is not None),
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
    info = _either(found, module, "bias", shape, "bias", trained and (biased or (module, "bias") in found))
    if info is not None:
        # PEFT puts a linear with LoRA behind `base_layer`, and drops a name without it silently.
        if info.name.endswith(".base_layer.bias") != targeted:
            raise invalid(info.name, f"PEFT would not find it: {module} has {'' if targeted else 'no '}LoRA")
        if base is not None and not biased:
            raise invalid(info.name, f"the base model's {module} has no bias")
    return info


def _either(
    found: Found, module: str, kind: str, shape: tuple[int, ...], field: str, wanted: bool
) -> TensorInfo | None:
    """The tensor if the config wants it; then it must be there, and otherwise it must not."""
    if wanted:
        return _expect(found, module, kind, shape, field)
    if (module, kind) in found:
        raise invalid(found[module, kind].name, f"{field} in adapter_config.json does not ask for it")
    return None


_SPELLED = {"A": "lora_A", "B": "lora_B", "lora_bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}


def _expect(found: Found, module: str, kind: str, shape: tuple[int, ...], field: str) -> TensorInfo:
    info = found.get((module, kind))
    if info is None:
        raise invalid(
            f"{module}.{_SPELLED.get(kind, kind)}",
            f"is missing in adapter_model.safetensors, and {field} in adapter_config.json asks for it",
        )
    if info.shape != shape:
        raise invalid(
            info.name,
            f"has shape {list(info.shape)}, expected {list(shape)} from the base model and the rank in "
            "adapter_config.json",
        )
    return info
