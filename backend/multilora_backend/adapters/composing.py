# SPDX-License-Identifier: Apache-2.0
"""The weights of a composition, from those of its parts: A of all of them along the rank, B scaled by their weights.

It computes what PEFT's `add_weighted_adapter(combination_type="cat")` does, which scales A instead: the product is the
same. What comes out is an adapter like any other, so nothing that runs it has to know.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

import torch

from multilora_backend.adapters.jobs import Job, Outcome, Purpose
from multilora_backend.adapters.layout import VERSION_DIGITS, AdapterWeights, SiteWeights, allocate
from multilora_backend.composition import plain
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

Compose = Callable[[Sequence[tuple[AdapterWeights, Decimal]]], AdapterWeights]
NOT_A_SUM = "an adapter with DoRA, trained biases, norms, embeddings, heads or tokens cannot be part of a sum"


def composed_version(parts: Iterable[tuple[str, Decimal]]) -> str:
    """By the versions of the parts and their weights, in whatever order."""
    lines = sorted(f"{version}:{plain(weight)}" for version, weight in parts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:VERSION_DIGITS]


def compose(
    parts: Sequence[tuple[AdapterWeights, Decimal]], sites: Sequence[LoraSite], dtype: torch.dtype, pin: bool = False
) -> AdapterWeights:
    """Its rank is the sum of theirs. In order of their versions, so that equal compositions are equal to the bit.

    B is scaled in float32 and rounded to `dtype` once more: an error of half a unit in the last place of each element.
    Raises MultiloraError if a scaled B does not fit `dtype`, or a part is activated, on experts, or more than A and B.
    """
    for weights, _ in parts:
        if why := why_no_part(weights, sites):
            raise MultiloraError(ErrorCode.UNSUPPORTED, why)
    ordered = sorted(parts, key=lambda part: (part[0].version, part[1]))
    rank = sum(weights.rank for weights, _ in ordered)
    touched = {i for weights, _ in ordered for i, site in enumerate(weights.sites) if site is not None}
    buffers, laid_out = allocate(sites, touched, rank, dtype, pin)
    for index, into in enumerate(laid_out):
        if into is not None:
            _join(into, [(w.sites[index], w.rank, float(weight)) for w, weight in ordered], len(sites[index].modules))
    version = composed_version((weights.version, weight) for weights, weight in ordered)
    return AdapterWeights(version, rank, laid_out, buffers, no_effect=all(weights.no_effect for weights, _ in ordered))


def why_no_part(weights: AdapterWeights, sites: Sequence[LoraSite]) -> str:
    """Why an adapter cannot be part of a sum; empty if it can."""
    if weights.invocation:
        return "an adapter with alora_invocation_tokens cannot be part of a sum"
    if weights.extras is not None:
        return NOT_A_SUM
    if any(site.experts and own is not None for site, own in zip(sites, weights.sites, strict=True)):
        return "an adapter with LoRA on experts cannot be part of a sum"
    return ""


def _join(into: SiteWeights, parts: Sequence[tuple[SiteWeights | None, int, float]], slices: int) -> None:
    into.a.zero_()
    into.b.zero_()
    a = into.a.view(slices, -1, into.a.shape[1])
    first = 0
    for part, rank, weight in parts:
        if part is not None:
            a[:, first : first + rank] = part.a.view(slices, -1, part.a.shape[1])[:, :rank]
            into.b[first : first + rank] = part.b[:rank].float() * weight
        first += rank
    low, high = torch.aminmax(into.b)
    if not math.isfinite(max(abs(float(low)), abs(float(high)))):
        raise invalid("lora_name", f"an adapter's B does not fit {into.b.dtype} with its weight")


def run_composed(job: Job, run: Callable[[Job], Outcome], compose: Compose) -> Outcome:
    """In a loader thread. `run` runs the job of a part. Whether parts have changed, the engine's thread sees."""
    if job.cached is not None and (job.frozen or all(_unchanged(part, run) for part, _ in job.parts)):
        return Outcome(job, None, weights=job.cached)
    outcomes = tuple(run(part) for part, _ in job.parts)
    read: list[tuple[AdapterWeights, Decimal]] = []
    for outcome, (part, weight) in zip(outcomes, job.parts, strict=True):
        if outcome.weights is None:
            name = part.key.partition("@")[0]
            return Outcome(job, None, reason=f"its part {name}: {outcome.reason}", parts=outcomes)
        read.append((outcome.weights, weight))
    return Outcome(job, None, weights=compose(read), parts=outcomes)


def _unchanged(part: Job, run: Callable[[Job], Outcome]) -> bool:
    if part.frozen or not part.source.is_local:
        return True
    return run(Job(part.key, part.source, Purpose.LOOK)).fingerprint == part.known
