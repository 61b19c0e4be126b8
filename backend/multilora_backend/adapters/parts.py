# SPDX-License-Identifier: Apache-2.0
"""A composition is read by way of its parts: from their copies on the host, else from their sources."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from multilora_backend.adapters.books import Event, Happened
from multilora_backend.adapters.jobs import Job, Outcome, Parts, Purpose
from multilora_backend.adapters.state import AdapterRecord, AdapterState

if TYPE_CHECKING:
    from multilora_backend.adapters.host import HostCache
    from multilora_backend.adapters.layout import AdapterWeights
    from multilora_backend.adapters.lifecycle import Lifecycle


def jobs_of_parts(
    record: AdapterRecord, purpose: Purpose, host: HostCache, trusts: Callable[[AdapterRecord], bool]
) -> Parts:
    """What a loader thread has to do for each part; empty for what is no composition."""
    jobs = []
    for part, weight in record.parts:
        cached = host.get(part.version) if part.version else None
        job = Job(part.key, part.entry.source, purpose, part.fingerprint, cached, trusts(part))
        jobs.append((job, weight))
    return tuple(jobs)


def take_in_parts(life: Lifecycle, record: AdapterRecord, outcome: Outcome) -> bool:
    """Takes down what was learned of the parts while a composition was read. False if it cannot be made.

    A part is treated as if it had been read for itself, unless that is under way.
    """
    stale = False
    for (part, _), read in zip(record.parts, outcome.parts, strict=False):
        free = life.books.records.get(part.key) is part and part.key not in life.readings
        weights, reason = read.weights, read.reason
        if weights is not None and part.version not in ("", weights.version):
            stale = True
            if free and (part.state is AdapterState.COLD or _can_follow(life, part, weights)):
                life.books.events.append(Event(Happened.CHANGED, part, read))
            continue
        if weights is not None:
            reason = _refused(life, part, weights)
        if reason and free and part.state is AdapterState.COLD:
            part.refused = read.fingerprint
            life.books.fail(part, reason, passing=read.fingerprint is None)
        elif weights is not None and not reason and free and read.seconds:
            life.learn(part, read)
            life.books.events.append(Event(Happened.READ, part, read))
    if stale:
        life.residency.free(record)
        if record.state is AdapterState.LOADING:
            life.books.move(record, AdapterState.COLD)
        life.books.events.append(Event(Happened.STALE, record))
        return False
    weights = outcome.weights
    if weights is not None and record.version not in ("", weights.version):
        life.books.set_version(record, "")  # from what an earlier run of the server had found in a part
    return True


def _can_follow(life: Lifecycle, part: AdapterRecord, weights: AdapterWeights) -> bool:
    """Whether a part that serves from the device can be replaced by what its source holds now."""
    serves = part.state is AdapterState.ACTIVE and not part.retired
    return serves and not _refused(life, part, weights)


def _refused(life: Lifecycle, part: AdapterRecord, weights: AdapterWeights) -> str:
    """Why a part would be, read for itself; empty if it is fine."""
    reason = unexpected(part.entry.version, weights.version)
    return reason or life.residency.pool.too_large(weights.rank, weights.extras_bytes)


def unexpected(wanted: str, found: str) -> str:
    """Why a content is not what an entry asks for; empty if it is."""
    return "" if found.startswith(wanted) else f"version {wanted} was asked for, and the source has {found}"
