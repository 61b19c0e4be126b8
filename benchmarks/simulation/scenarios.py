# SPDX-License-Identifier: Apache-2.0
"""What is simulated: each scenario is a few cases of traffic, played to both schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

from simulation import workloads
from simulation.simulator import Setup, simulate
from simulation.workloads import Request, Tenant, adapter_name

GIB = 2**30
A10G_TO_H200 = 30.0
"""VTC's rates are for an A10G, which S-LoRA's own runs saturate at 1.6 requests a second; the H200 takes about 50."""
DEFAULT_POOL = 102
"""Rank-16 adapters in the 8 GiB that the engine takes for them on a large device."""


@dataclass(frozen=True)
class Case:
    name: str
    requests: Callable[[], list[Request]]
    """Made when it is played: some of them take a simulation of their own to know their rate."""
    setup: Setup


def _registered(count: int, ranks: tuple[int, ...] = (16,)) -> dict[str, int]:
    return {adapter_name(i): ranks[i % len(ranks)] for i in range(count)}


@lru_cache(maxsize=8)
def capacity(adapters: int) -> float:
    """Requests a second of S-LoRA's lengths, with so many adapters that never leave the device and a full queue."""
    requests = workloads.mixed([1.0] * adapters, 1e6, 1500 / 1e6)
    run = simulate(requests, Setup(_registered(adapters), adapters, 4 * GIB))
    # From when the batch is full until the queue is empty: the start and the drain are not capacity.
    ends = sorted(record.last for record in run.recorder.records)
    low, high = len(ends) // 5, len(ends) * 4 // 5
    return (high - low) / (ends[high] - ends[low])


def s_lora(scale: float) -> Iterator[Case]:
    """S-LoRA's S2 ranks, 200 adapters, host cache for a quarter of them."""
    setup = Setup(_registered(200, (64, 32, 16, 8)), DEFAULT_POOL, 8 * GIB)
    for alpha, cv in ((1.0, 1.0), (0.3, 1.0), (1.0, 4.0)):
        requests = partial(workloads.s_lora, 200, alpha, 20.0, cv, 300.0 * scale)
        yield Case(f"s-lora alpha {alpha:g} cv {cv:g}", requests, setup)


def punica(scale: float) -> Iterator[Case]:
    for kind in ("distinct", "uniform", "skewed", "identical"):
        count = max(32, int(1024 * scale))
        adapters = len(workloads.punica_counts(kind, count))
        yield Case(f"punica {kind}", partial(workloads.punica, kind, count), Setup(_registered(adapters), DEFAULT_POOL))


def vtc(scale: float) -> Iterator[Case]:
    for name, each in workloads.VTC.items():
        duration = 360.0 * scale
        requests = partial(workloads.clients, each, duration, scale=A10G_TO_H200)
        setup = Setup({client.name: 8 for client in each}, DEFAULT_POOL, until=duration)
        yield Case(f"vtc {name}", requests, setup)


def slots(scale: float) -> Iterator[Case]:
    """More adapters than slots: 6 on 3 beyond capacity, and 15 on 3 just below it."""
    duration = 600.0 * scale
    setup = Setup(_registered(6), 3, settings={"max_loras": 3}, watched=tuple(_registered(6)))
    yield Case("6 on 3 slots", lambda: workloads.mixed([1.0] * 6, 1.5 * capacity(3), duration), setup)
    setup = Setup(_registered(15), 3, settings={"max_loras": 3}, watched=tuple(_registered(15)))
    yield Case("15 on 3 slots", lambda: workloads.gateway(0.9 * capacity(3), duration), setup)


def uniform(scale: float) -> Iterator[Case]:
    """1,000 adapters alike, room for 64: where each scheduler's goodput is best, the rates lie around."""
    for rate in (4.6, 4.8, 5.0, 9.4, 9.7, 10.0):
        requests = partial(workloads.s_lora, 1000, 1.0, rate, 1.0, 300.0 * scale)
        yield Case(f"1000 uniform {rate:g}/s", requests, Setup(_registered(1000), 64))


TENANTS = (
    Tenant("bank", 0.25, 500, 0.6, 0.45, 0.8, priority=1),
    Tenant("shop", 0.25, 2000, 0.3, 0.6, 0.7),
    Tenant("game", 0.2, 2500, 0.3, 0.9, 0.9),
    Tenant("school", 0.15, 2000, 0.6, 0.4, 1.0),
    Tenant("lab", 0.1, 2000, 1.0, 0.1, 0.5),
    Tenant("crawler", 0.05, 1000, 1.0, 0.0, 0.0),
)


def platform(scale: float) -> Iterator[Case]:
    """Ten minutes, which are a day of six tenants with 10,000 adapters between them."""
    requests = partial(workloads.diurnal, TENANTS, 14.0, 600.0 * scale)
    setup = Setup(_registered(10_000), DEFAULT_POOL, 64 * GIB, settings={"adapter_load_threads": 4})
    yield Case("10000 of six tenants", requests, setup)


LOOP_RUNS = 5
"""Virtual machines vary: a fixed loop took 184 to 376 ms of CPU where this was written."""


def loop(scale: float) -> Iterator[Case]:
    """What the step loop costs the host: 10,000 registered, 512 running, thousands waiting."""
    requests = partial(workloads.s_lora, 10_000, 0.1, 200.0, 1.0, 30.0 * scale, lengths=(200, 512))
    setup = Setup(_registered(10_000), DEFAULT_POOL, settings={"max_num_seqs": 512}, until=30.0 * scale)
    for run in range(1, LOOP_RUNS + 1):
        yield Case(f"512 running of 10000, run {run}", requests, setup)


SCENARIOS: dict[str, Callable[[float], Iterator[Case]]] = {
    "vtc": vtc,
    "slots": slots,
    "uniform": uniform,
    "platform": platform,
    "loop": loop,
    "s-lora": s_lora,
    "punica": punica,
}
