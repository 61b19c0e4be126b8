# SPDX-License-Identifier: Apache-2.0
"""What a step costs the host: the target is 1 ms at 10,000 registered adapters, 512 running and thousands waiting.

The bounds are generous, since the machines that run this are shared; docs/scheduling.md has measured figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from multilora_backend.scheduling.accounts import Accounts, backlogged, charge
from simulation_modules import simulation_modules

BOUND_S = 5e-3


@pytest.fixture(scope="module")
def sim() -> Iterator[SimpleNamespace]:
    with simulation_modules() as modules:
        yield modules


def median_step_s(sim: SimpleNamespace, registered: int, tenants: int = 1) -> float:
    """CPU time of `poll` and `schedule`: 512 running, 3,000 waiting, most of them for a tenth of 400 adapters."""
    requests = [
        sim.workloads.Request(0.0, f"a{i % (400 if i % 3 == 0 else 40)}", 64, 400, f"t{i % tenants}")
        for i in range(3500)
    ]
    ranks = {f"a{i}": 16 for i in range(registered)}
    setup = sim.simulator.Setup(ranks, sim.scenarios.DEFAULT_POOL, settings={"max_num_seqs": 512}, until=8.0)
    full = sim.simulator.simulate(requests, setup).recorder.full_host_s
    assert len(full) > 50
    return statistics.median(full)


def test_a_step_takes_milliseconds_at_most_whatever_is_registered(sim: SimpleNamespace):
    few, many = median_step_s(sim, 400), median_step_s(sim, 10_000)
    assert many < BOUND_S
    assert many < 3 * few + 1e-3


def test_nor_does_it_with_many_tenants(sim: SimpleNamespace):
    assert median_step_s(sim, 400, tenants=300) < 2 * BOUND_S


def test_accounts_cost_the_same_however_many_there_are():
    def cost(children: int) -> float:
        accounts = Accounts()
        paths = [accounts.open(("c", 1.0), (str(i), 1.0), ("", 1.0)) for i in range(children)]
        for path in paths:
            backlogged(path)
        begun = time.thread_time()
        for _ in range(2000):
            charge(paths[0], 1.0)
            accounts.root.level()
        return time.thread_time() - begun

    assert min(cost(5000) for _ in range(3)) < 5 * min(cost(5) for _ in range(3)) + 1e-3
