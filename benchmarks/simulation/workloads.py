# SPDX-License-Identifier: Apache-2.0
"""Requests of the published workloads, and of this project's own: who asks for how much of which adapter, and when.

Each is a pure function of its parameters and a seed. The papers' rates are for smaller devices: `scale` multiplies
them, and the shapes stay. Lengths of the papers' ranges are drawn as theirs are, the upper end left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Request:
    at: float
    """Seconds after the start."""
    adapter: str
    """Empty: the base model."""
    prompt: int
    output: int
    tenant: str = ""
    priority: int = 0


Range = tuple[int, int]
S_LORA_LENGTHS: Range = (8, 512)


def adapter_name(index: int) -> str:
    return f"a{index}"


def s_lora(
    adapters: int,
    alpha: float,
    rate: float,
    cv: float,
    duration: float,
    *,
    lengths: Range = S_LORA_LENGTHS,
    seed: int = 42,
) -> list[Request]:
    """S-LoRA's synthetic traffic: power-law popularity, gamma gaps with coefficient of variation `cv`.

    P(index < k) = (k / adapters)^alpha: 1 is uniform, smaller is more skewed.
    """
    random = np.random.default_rng(seed)
    total = int(rate * duration)
    indices = (random.power(alpha, total) * adapters).astype(int)
    inputs, outputs = random.integers(*lengths, total), random.integers(*lengths, total)
    times = np.cumsum(random.gamma(1 / cv**2, cv**2 / rate, total))
    return _requests(times, [adapter_name(i) for i in indices], inputs, outputs)


def punica_counts(distribution: str, requests: int) -> list[int]:
    """Requests of each adapter in Punica's four classes of popularity."""
    if distribution == "distinct":
        return [1] * requests
    if distribution == "identical":
        return [requests]
    if distribution == "uniform":
        models = int(np.ceil(np.sqrt(requests)))
        return [len(range(i, requests, models)) for i in range(models)]
    if distribution != "skewed":
        raise ValueError(f"distribution: must be distinct, identical, uniform or skewed, got {distribution!r}")
    # Each adapter is asked for 1.5 times as often as the next one, rounded down; what is left over goes to one more.
    counts: list[int] = []
    while sum(counts) + int(1.5 ** len(counts)) <= requests:
        counts.append(int(1.5 ** len(counts)))
    rest = requests - sum(counts)
    return sorted([*counts, rest] if rest else counts, reverse=True)


def punica(distribution: str, requests: int = 1024, seed: int = 0xABCDABCD987) -> list[Request]:
    """All requests at once in random order; short lognormal prompts, totals uniform up to 2,048: nearly all decode."""
    random = np.random.default_rng(seed)
    names = [adapter_name(i) for i, n in enumerate(punica_counts(distribution, requests)) for _ in range(n)]
    random.shuffle(names)
    inputs = np.clip(np.round(random.lognormal(-1.0, 0.8, requests) * 18), 2, 2048).astype(int)
    outputs = np.maximum(random.integers(0, 2048, requests) - inputs, 2)
    return _requests(np.zeros(requests), names, inputs, outputs)


@dataclass(frozen=True)
class Client:
    """A tenant of the VTC paper: one adapter, one rate. Its requests of every second `on_off` seconds fall away."""

    name: str
    rate: float
    prompt: Range = (256, 257)
    output: Range = (256, 257)
    on_off: float = 0.0
    poisson: bool = False


def clients(each: Sequence[Client], duration: float, *, scale: float = 1.0, seed: int = 42) -> list[Request]:
    """The traffic of several clients, evenly spaced or Poisson."""
    random = np.random.default_rng(seed)
    found: list[Request] = []
    for client in each:
        rate = client.rate * scale
        total = int(rate * duration)
        gaps = random.exponential(1 / rate, total) if client.poisson else np.full(total, 1 / rate)
        times = np.cumsum(gaps) + random.random() / rate
        inputs, outputs = random.integers(*client.prompt, total), random.integers(*client.output, total)
        requests = _requests(times, [client.name] * total, inputs, outputs, client.name)
        found += [r for r in requests if not client.on_off or int(r.at // client.on_off) % 2 == 0]
    return _ordered(found, duration)


VTC: dict[str, tuple[Client, ...]] = {
    "overload": (Client("a", 1.5), Client("b", 3.0)),
    "overload-multi": tuple(Client("abcdefgh"[i], 0.4 if i < 3 else 0.6) for i in range(8)),
    "proportional": (Client("a", 0.25), Client("b", 0.5), Client("c", 1.5)),
    "on-off-less": (Client("a", 0.5, on_off=60.0), Client("b", 2.0)),
    "on-off-overload": (Client("a", 2.0, on_off=60.0), Client("b", 3.0)),
    "poisson-on-off": (
        Client("a", 0.5, (16, 512), (16, 512), on_off=60.0, poisson=True),
        Client("b", 2.0, (16, 512), (16, 512), poisson=True),
    ),
    "short-long": (
        Client("a", 8.0, (64, 65), (64, 65), poisson=True),
        Client("b", 1.5, (256, 257), (256, 257), poisson=True),
    ),
    "long-prompt-long-answer": (
        Client("a", 8.0, (512, 513), (32, 33), poisson=True),
        Client("b", 1.5, (32, 33), (512, 513), poisson=True),
    ),
}
"""The suites of the VTC paper's artifact, in requests a second of an A10G."""


def gateway(rate: float, duration: float, *, lengths: Range = S_LORA_LENGTHS, seed: int = 1) -> list[Request]:
    """15 adapters in three groups of five that take 60%, 30% and 10% of Poisson traffic, as the Gateway API tests."""
    shares = [share / 5 for share in (0.6, 0.3, 0.1) for _ in range(5)]
    return mixed(shares, rate, duration, lengths=lengths, seed=seed)


def mixed(
    shares: Sequence[float], rate: float, duration: float, *, lengths: Range = S_LORA_LENGTHS, seed: int = 1
) -> list[Request]:
    """Poisson traffic of which adapter i gets shares[i]."""
    random = np.random.default_rng(seed)
    total = int(rate * duration)
    times = np.cumsum(random.exponential(1 / rate, total))
    indices = random.choice(len(shares), total, p=np.asarray(shares) / sum(shares))
    inputs, outputs = random.integers(*lengths, total), random.integers(*lengths, total)
    names = [adapter_name(i) for i in indices]
    return _ordered(_requests(times, names, inputs, outputs), duration)


@dataclass(frozen=True)
class Tenant:
    """One customer of a platform: its own range of adapters, a daily wave with its own peak hour, an SLA."""

    name: str
    share: float
    """Of all requests, averaged over a day."""
    adapters: int
    alpha: float
    peak: float
    """Part of the day, 0 to 1, at which it asks for most."""
    depth: float
    """0: the same all day; 1: nothing at all at its quietest."""
    priority: int = 0


def diurnal(
    tenants: Sequence[Tenant],
    rate: float,
    duration: float,
    *,
    lengths: Range = S_LORA_LENGTHS,
    base_share: float = 0.1,
    seed: int = 7,
) -> list[Request]:
    """A day pressed into `duration`: each tenant's rate is a sine wave; `base_share` of it asks for the base model."""
    random = np.random.default_rng(seed)
    found: list[Request] = []
    first = 0
    for tenant in tenants:
        peak = rate * tenant.share * (1 + tenant.depth)
        total = random.poisson(peak * duration)
        times = np.sort(random.random(total)) * duration
        wave = 1 + tenant.depth * np.cos(2 * np.pi * (times / duration - tenant.peak))
        times = times[random.random(total) * (1 + tenant.depth) < wave]
        indices = first + (random.power(tenant.alpha, len(times)) * tenant.adapters).astype(int)
        base = random.random(len(times)) < base_share
        names = ["" if plain else adapter_name(i) for i, plain in zip(indices, base, strict=True)]
        inputs, outputs = (random.integers(*lengths, len(times)) for _ in range(2))
        requests = _requests(times, names, inputs, outputs, tenant.name)
        found += [replace(request, priority=tenant.priority) for request in requests]
        first += tenant.adapters
    return _ordered(found, duration)


def _requests(
    times: np.ndarray, names: Sequence[str], inputs: np.ndarray, outputs: np.ndarray, tenant: str = ""
) -> list[Request]:
    return [
        Request(at, name, prompt, output, tenant)
        for at, name, prompt, output in zip(times.tolist(), names, inputs.tolist(), outputs.tolist(), strict=True)
    ]


def _ordered(requests: list[Request], duration: float) -> list[Request]:
    return sorted((r for r in requests if r.at < duration), key=lambda r: r.at)
