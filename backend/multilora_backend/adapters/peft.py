# SPDX-License-Identifier: Apache-2.0
"""From a PEFT folder to weights in device layout, strictly: every field understood, every tensor used, or refused."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from multilora_backend.adapters.affine import fill_affine
from multilora_backend.adapters.base import BaseModel
from multilora_backend.adapters.contents import put
from multilora_backend.adapters.extras import Extras, allocate_extras
from multilora_backend.adapters.folder import CONFIG, PICKLED, WEIGHTS, member, read_config
from multilora_backend.adapters.layout import VERSION_DIGITS, AdapterWeights, SiteWeights, allocate
from multilora_backend.adapters.lineage import (
    BASE_CONFIG,
    base_config_beside,
    check_base_config,
    check_recorded,
    check_vocabulary,
)
from multilora_backend.adapters.norms import fill_norms
from multilora_backend.adapters.opened import OpenWeights, open_weights
from multilora_backend.adapters.own_tokens import TOKENIZER, read_tokens
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.peft_plan import AdapterPlan, Part, plan_adapter
from multilora_backend.adapters.placing import place
from multilora_backend.adapters.state import Fingerprint
from multilora_backend.adapters.tensors import Header, parse_header, tensor_of
from multilora_backend.adapters.vocabulary_fill import fill_table
from multilora_backend.added_tokens import NO_TOKENS, AddedTokens
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

PLANS_KEPT = 64
"""Adapters that were trained alike have the same plan. Making one, 7 ms of Python at 8B, holds up the step loop."""


def fingerprint(folder: Path | str) -> Fingerprint:
    """Changes when the folder's content does, as far as the file system's clock and sizes tell."""

    # Strings, not paths: a watcher asks this of thousands of folders, three times as fast.
    def of(path: str) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(path)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    place = os.fspath(folder)
    return tuple(of(f"{place}/{name}") for name in (CONFIG, WEIGHTS, PICKLED, TOKENIZER, BASE_CONFIG))


def check_adapter(
    folder: Path, sites: Sequence[LoraSite], inside: Sequence[Path] = (), base: BaseModel | None = None
) -> AdapterPlan:
    """All checks that need no weights: reads the config and the header. Raises as `read_adapter` does."""
    config = PeftConfig.parse(read_config(folder, inside))
    with open_weights(folder, config, inside) as weights:
        return _checked(folder, weights, tuple(sites), inside, base)


def read_adapter(
    folder: Path,
    sites: Sequence[LoraSite],
    dtype: torch.dtype,
    pin: bool = False,
    inside: Sequence[Path] = (),
    sha256: str = "",
    base: BaseModel | None = None,
) -> AdapterWeights:
    """Reads, checks and lays out an adapter, in pinned memory if `pin`.

    `inside`: resolved folders that links may lead to as well. `sha256`: what the weights' file must have; empty: any.

    Raises MultiloraError with the reason if PEFT would compute anything else from this folder than we could, or
    OSError if a file cannot be read. Scales are folded into B in float32 before the cast to `dtype`. Without `base`
    adapters with extras are refused.
    """
    text = read_config(folder, inside)
    config = PeftConfig.parse(text)
    with open_weights(folder, config, inside) as opened:
        plan = _checked(folder, opened, tuple(sites), inside, base)
        data, content = opened.read()
    if sha256:
        check_sha256(content[0].hex(), sha256)
    version = hashlib.sha256(text + b"".join(content) + plan.tokens.digest.encode()).hexdigest()[:VERSION_DIGITS]
    ranks: Counter[int] = Counter()
    for part in plan.parts:
        copies = max(sites[part.site].experts, 1) if part.expert is None else 0
        ranks[part.site] += part.rank * copies
    buffers, weights = allocate(sites, ranks, plan.rank, dtype, pin)
    for index, laid_out in enumerate(weights):
        # The usual adapter, of one rank and on every module, covers its memory: nothing is written twice.
        if laid_out is not None and ranks[index] < len(laid_out.a):
            laid_out.a.zero_()
            laid_out.b.zero_()
    effects = [_fill(weights[part.site], part, sites[part.site], data) for part in plan.parts]
    extras = None
    if base is not None and plan.extras:
        extras = allocate_extras(plan.extras, pin)
        effects.append(_fill_extras(extras, plan, sites, base, data))
    invocation = config.alora_invocation_tokens
    return AdapterWeights(version, plan.rank, weights, buffers, not any(effects), extras, invocation, plan.tokens)


def _checked(
    folder: Path, weights: OpenWeights, sites: tuple[LoraSite, ...], inside: Sequence[Path], base: BaseModel | None
) -> AdapterPlan:
    trained_on = base_config_beside(folder, inside)
    if base is not None:
        check_base_config(trained_on, base)
    plan = _plan(weights.config, weights.header, sites, base)
    if base is not None and not plan.vocabulary:
        check_vocabulary(trained_on, base)
    return replace(plan, tokens=_own_tokens(folder, plan, inside, base))


@lru_cache(maxsize=PLANS_KEPT)
def _plan(config: PeftConfig, header: Header, sites: tuple[LoraSite, ...], base: BaseModel | None) -> AdapterPlan:
    tensors = parse_header(header, WEIGHTS)
    check_recorded(config, header, WEIGHTS, base)
    plan = plan_adapter(config, tensors, sites, base)
    if config.alora_invocation_tokens and plan.extras:
        why = "cannot be combined with DoRA, trained biases, norms, embeddings, heads or tokens"
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"alora_invocation_tokens: {why}")
    return plan


def _own_tokens(folder: Path, plan: AdapterPlan, inside: Sequence[Path], base: BaseModel | None) -> AddedTokens:
    # Who trains new tokens trains a table. Of others even a look at the file would cost more than all else.
    if not plan.tables or base is None or base.tokenizer is None or not (folder / TOKENIZER).exists():
        return NO_TOKENS
    vocabulary = plan.vocabulary or (0 if base.embedding is None else len(base.embedding))
    return read_tokens(member(folder, TOKENIZER, inside), base.tokenizer, vocabulary)


def _fill_extras(
    extras: Extras, plan: AdapterPlan, sites: Sequence[LoraSite], base: BaseModel, data: NDArray[np.uint8]
) -> bool:
    """False if they change nothing."""
    tensor = partial(tensor_of, data=data)
    effects = [fill_affine(extras, plan.affine, sites, base, tensor), fill_norms(extras, plan.norms, base, tensor)]
    effects += [fill_table(extras, table, base, tensor) for table in plan.tables]
    return any(effects)


def _fill(weights: SiteWeights | None, part: Part, site: LoraSite, data: NDArray[np.uint8]) -> bool:
    """Writes one module's A and scaled B. False if their product is zero."""
    if weights is None:
        raise RuntimeError(f"no room was laid out for {part.module}")
    a, b = place(weights, part, site, tensor_of(part.a, data), tensor_of(part.b, data))
    effects = [put(a.target, part.a, a.source), put(b.target, part.b, b.source, part.scale)]
    return all(effects)


def check_sha256(digest: str, expected: str) -> None:
    """Raises MultiloraError if they differ."""
    if digest != expected:
        raise invalid("sha256", f"{WEIGHTS} has {digest}, expected {expected}")
