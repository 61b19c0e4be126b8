# SPDX-License-Identifier: Apache-2.0
"""Traffic is what its papers say it is."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.mark.parametrize(("alpha", "share"), [(0.1, 0.59), (0.3, 0.20), (0.6, 0.042), (1.0, 0.005)])
def test_s_lora_s_most_popular_adapter_has_its_share(sim: SimpleNamespace, alpha: float, share: float):
    requests = sim.workloads.s_lora(200, alpha, 100.0, 1.0, 300.0)
    (_, most) = Counter(r.adapter for r in requests).most_common(1)[0]
    first = sum(r.adapter == "a0" for r in requests) / len(requests)
    assert first == pytest.approx(share, abs=4 * (share / len(requests)) ** 0.5 + 0.002)
    assert alpha == 1.0 or first == most / len(requests)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_s_lora_s_gaps_vary_as_asked(sim: SimpleNamespace, cv: float):
    requests = sim.workloads.s_lora(10, 1.0, 100.0, cv, 300.0)
    gaps = np.diff([r.at for r in requests])
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert gaps.mean() == pytest.approx(0.01, rel=0.1)
    assert len(requests) == 30_000
    assert {min(r.prompt for r in requests), max(r.output for r in requests)} == {8, 511}


def test_punica_s_classes(sim: SimpleNamespace):
    counts = sim.workloads.punica_counts
    assert counts("distinct", 7) == [1] * 7
    assert counts("identical", 7) == [7]
    assert counts("uniform", 1024) == [32] * 32
    assert counts("skewed", 32) == [11, 7, 5, 3, 2, 2, 1, 1]
    assert counts("skewed", 1024)[:8] == [291, 194, 157, 129, 86, 57, 38, 25]
    assert len(counts("skewed", 1024)) == 16
    with pytest.raises(ValueError, match="distribution: must be"):
        counts("other", 3)


@pytest.mark.parametrize("requests", [1, 2, 3, 10, 1000, 1023])
@pytest.mark.parametrize("kind", ["distinct", "identical", "uniform", "skewed"])
def test_punica_s_classes_spread_all_requests(sim: SimpleNamespace, kind: str, requests: int):
    counts = sim.workloads.punica_counts(kind, requests)
    assert sum(counts) == requests
    assert min(counts) >= 1
    assert Counter(r.adapter for r in sim.workloads.punica(kind, requests)).total() == requests


def test_punica_s_lengths(sim: SimpleNamespace):
    requests = sim.workloads.punica("distinct", 1024)
    assert np.mean([r.output for r in requests]) == pytest.approx(986, rel=0.06)
    assert all(r.at == 0 and r.output >= 2 for r in requests)


def test_clients_that_are_off_ask_for_nothing(sim: SimpleNamespace):
    requests = sim.workloads.clients(sim.workloads.VTC["on-off-overload"], 240.0, scale=10.0)
    mine = [r.at for r in requests if r.tenant == "a"]
    assert mine
    assert all(int(at // 60) % 2 == 0 for at in mine)
    others = Counter(int(r.at // 60) for r in requests if r.tenant == "b")
    assert all(count == pytest.approx(1800, abs=2) for count in others.values())
    assert [r.at for r in requests] == sorted(r.at for r in requests)


def test_every_vtc_suite_has_its_rates(sim: SimpleNamespace):
    for name, clients in sim.workloads.VTC.items():
        requests = sim.workloads.clients(clients, 120.0, scale=10.0)
        for client in clients:
            on = 0.5 if client.on_off else 1.0
            expected = client.rate * 10 * 120 * on
            got = sum(r.tenant == client.name for r in requests)
            assert got == pytest.approx(expected, abs=5 * expected**0.5), (name, client.name)


def test_the_gateway_s_three_groups(sim: SimpleNamespace):
    requests = sim.workloads.gateway(100.0, 100.0)
    groups = Counter(int(r.adapter[1:]) // 5 for r in requests)
    for group, share in enumerate((0.6, 0.3, 0.1)):
        assert groups[group] / len(requests) == pytest.approx(share, abs=0.02)


def test_a_day_has_peaks_and_every_tenant_its_own_adapters(sim: SimpleNamespace):
    tenants = (
        sim.workloads.Tenant("noon", 0.7, 10, 1.0, 0.5, 1.0, priority=1),
        sim.workloads.Tenant("night", 0.3, 20, 1.0, 0.0, 0.5),
    )
    requests = sim.workloads.diurnal(tenants, 100.0, 200.0)
    noon = [r for r in requests if r.tenant == "noon"]
    assert len(noon) / len(requests) == pytest.approx(0.7, abs=0.02)
    middle = sum(75 <= r.at < 125 for r in noon) / len(noon)
    assert middle == pytest.approx(0.25 + 2**0.5 / (2 * np.pi), abs=0.03)
    names = {tenant.name: {r.adapter for r in requests if r.tenant == tenant.name} - {""} for tenant in tenants}
    assert names["noon"] == {f"a{i}" for i in range(10)}
    assert names["night"] == {f"a{i}" for i in range(10, 30)}
    assert {r.priority for r in noon} == {1}
    assert sum(not r.adapter for r in requests) / len(requests) == pytest.approx(0.1, abs=0.01)


def test_the_same_seed_gives_the_same_traffic(sim: SimpleNamespace):
    assert sim.workloads.gateway(10.0, 10.0) == sim.workloads.gateway(10.0, 10.0)
    assert sim.workloads.gateway(10.0, 10.0) != sim.workloads.gateway(10.0, 10.0, seed=2)


def test_every_scenario_has_cases_whose_adapters_are_registered(sim: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sim.scenarios, "capacity", lambda adapters: 50.0)
    for name, cases in sim.scenarios.SCENARIOS.items():
        for case in cases(0.01):
            requests = case.requests()
            assert requests, name
            assert {r.adapter for r in requests} - {""} <= set(case.setup.ranks), case.name


def test_capacity_is_what_a_full_batch_gets_through(sim: SimpleNamespace):
    """Of the engine benchmark's 14,000 tokens a second; its requests are 512 of 256 tokens each way, these vary."""
    mean = sum(sim.workloads.S_LORA_LENGTHS) / 2
    assert sim.scenarios.capacity(3) * mean == pytest.approx(14_000, rel=0.1)
