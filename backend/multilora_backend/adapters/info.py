# SPDX-License-Identifier: Apache-2.0
"""A revision in an operator's words."""

from __future__ import annotations

from collections.abc import Iterable

from multilora_backend.adapters.lifecycle import Lifecycle
from multilora_backend.adapters.registry import Registry
from multilora_backend.adapters.state import AdapterRecord
from multilora_backend.protocol import AdapterInfo


def adapter_info(
    record: AdapterRecord, others: Iterable[AdapterRecord], life: Lifecycle, registry: Registry, pending: bool
) -> AdapterInfo:
    """`others`: of the same name."""
    entry, now = record.entry, life.books.clock()
    return AdapterInfo(
        name=entry.name,
        key=record.key,
        version=record.version or None,
        versions=[other.version for other in others if other is not record and other.version],
        current=not record.retired,
        pending=pending,
        state=record.state.value,
        since_s=now - record.since,
        reason=record.reason or record.note,
        history=[(now - at, state.value, reason) for at, state, reason in record.history],
        level=life.level(record),
        rank=record.rank,
        bytes=record.nbytes,
        pinned=record.pinned,
        aliases=registry.leading_to(entry.name) if registry.aliases else [],
        source=entry.source.text,
        origin=entry.origin.value,
        tenants=list(entry.tenants),
        leases=record.leases,
        holds=record.holds,
        requests_total=record.requests,
        loads_total=record.loads,
        load_seconds=record.load_seconds,
        last_used_s=None if record.last_used is None else now - record.last_used,
        no_effect=record.no_effect,
    )
