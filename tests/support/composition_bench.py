# SPDX-License-Identifier: Apache-2.0
"""Compositions of the adapters of an `adapter_bench.Bench`, and what must be in the pool for them."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import torch

from adapter_bench import SITE, Bench, weights_of
from multilora_backend.adapters.composing import compose, composed_version
from multilora_backend.adapters.layout import AdapterWeights
from multilora_backend.adapters.state import AdapterRecord


def active(bench: Bench, asked: str) -> str:
    """Holds and activates a composition."""
    key = bench.manager.resolve(asked)
    bench.manager.hold(key)
    bench.activate(key)
    return key


def expected(**parts: tuple[int, str]) -> AdapterWeights:
    return compose([(weights_of(f, r), Decimal(w)) for f, (r, w) in parts.items()], [SITE], torch.float32)


def is_there(bench: Bench, key: str, weights: AdapterWeights) -> bool:
    lease, pool = bench.manager.lease(key), bench.manager.pool
    bench.manager.release(lease)
    rows = slice(lease.rank_start, lease.rank_start + len(weights.sites[0].b))
    return lease.version == weights.version and torch.equal(pool.b[0][rows], weights.sites[0].b)


def content_of(record: AdapterRecord, written: Mapping[str, tuple[str, int]]) -> AdapterWeights:
    """What its version says, whatever its source holds by now; `written` has all contents that there ever were."""
    if not record.parts:
        return weights_of(*written[record.version])
    parts = [(content_of(part, written), weight) for part, weight in record.parts]
    assert record.version == composed_version((weights.version, weight) for weights, weight in parts)
    return compose(parts, [SITE], torch.float32)
