# SPDX-License-Identifier: Apache-2.0
"""Fair shares in virtual time: VTC's bound for backlogged tenants and adapters, weights, classes, deadlines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.core import FinishReason, Sequence
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.scheduler import Scheduler
from multilora_backend.scheduling.tenants import Tenants
from profiles import examples
from virtual_scheduler import FIRST_COME, FakeAdapters, Traffic, add, make

SEQS = 8


def scheduler(policy: Policy | None = None, **settings) -> Scheduler:
    return make(num_pages=400, page_size=16, seqs=SEQS, tokens=512, policy=policy or Policy(), **settings)


def flood(
    target: Scheduler, tenant: str, count: int, prompt: int, output: int, times: int = 1, **values
) -> list[Sequence]:
    return [add(target, prompt, tenant=tenant, max_len=prompt + output, **values) for _ in range(count)]


def largest_difference(traffic: Traffic, requests: dict[str, dict], steps: int) -> float:
    """Of what two tenants have got since any earlier time, while each always has something waiting."""
    least: dict[tuple[str, str], float] = {}
    found = 0.0
    for _ in range(steps):
        for tenant, shape in requests.items():
            waiting = traffic.scheduler.lines.quota(tenant, traffic.now).waiting
            flood(traffic.scheduler, tenant, 2 * SEQS * shape.get("times", 1) - waiting, arrival=traffic.now, **shape)
        traffic.step()
        for a in requests:
            for b in requests:
                ahead = traffic.service[a] - traffic.service[b]
                least[a, b] = min(least.get((a, b), ahead), ahead)
                found = max(found, ahead - least[a, b])
    return found


@examples(15)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=2, max_size=4),
    adapters=st.booleans(),
)
def test_backlogged_tenants_stay_within_vtcs_bound(shapes: list[tuple[int, int]], adapters: bool):
    """2 x max(input weight x longest prompt, output weight x tokens of a batch), whatever their requests look like."""
    requests = {
        f"t{i}": {"prompt": prompt, "output": output, "adapter": f"a{i}" if adapters else ""}
        for i, (prompt, output) in enumerate(shapes)
    }
    longest = max(prompt + output for prompt, output in shapes)
    bound = 2 * max(max(prompt for prompt, _ in shapes), 2 * SEQS * longest)
    assert largest_difference(Traffic(scheduler()), requests, 200) <= bound


def test_first_come_first_served_knows_no_bound():
    requests = {
        "greedy": {"prompt": 10, "output": 10, "times": 5},
        "modest": {"prompt": 10, "output": 10},
    }
    bound = 2 * 2 * SEQS * 20
    assert largest_difference(Traffic(scheduler(FIRST_COME)), requests, 400) > 3 * bound
    assert largest_difference(Traffic(scheduler()), requests, 400) <= bound


def test_adapters_of_one_tenant_share_as_tenants_do():
    target = scheduler()
    for adapter, count in (("loud", 300), ("quiet", 60)):
        for _ in range(count):
            add(target, 10, adapter, max_len=20)
    traffic = Traffic(target)
    for _ in range(100):
        traffic.step()
    assert len(traffic.waits["quiet"]) == pytest.approx(len(traffic.waits["loud"]), abs=2 * SEQS)


def test_service_follows_weights():
    tenants = Tenants.parse({"tenants": {"gold": {"weight": 3}, "iron": {}}})
    target = scheduler(tenants=tenants)
    for tenant in ("gold", "iron"):
        flood(target, tenant, 500, 10, 10)
    traffic = Traffic(target)
    for _ in range(400):
        traffic.step()
    assert traffic.service["gold"] / traffic.service["iron"] == pytest.approx(3, rel=0.1)


def test_who_was_idle_has_saved_up_nothing_and_waits_for_nobody():
    target = scheduler()
    flood(target, "busy", 1000, 10, 10)
    traffic = Traffic(target)
    for _ in range(200):
        traffic.step()
    before = traffic.service.copy()
    late = flood(target, "back", 1000, 10, 10, arrival=traffic.now)
    for _ in range(100):
        traffic.step()
    assert late[0].started is not None
    assert late[0].started - late[0].arrival <= 11 * traffic.step_s, "the first seat that becomes free is its"
    got = {t: traffic.service[t] - before[t] for t in ("busy", "back")}
    assert got["back"] / got["busy"] == pytest.approx(1, abs=0.2)


def test_a_tenant_at_its_cap_gives_nobody_an_advantage():
    """It has requests waiting and a low counter all the time, but nobody is compared with it."""
    target = scheduler(tenants=Tenants.parse({"tenants": {"capped": {"tokens_per_s": 1}}}))
    flood(target, "capped", 50, 10, 10)
    flood(target, "busy", 1000, 10, 10)
    traffic = Traffic(target)
    for _ in range(200):
        traffic.step()
    before = traffic.service.copy()
    flood(target, "back", 1000, 10, 10, arrival=traffic.now)
    for _ in range(100):
        traffic.step()
    got = {t: traffic.service[t] - before[t] for t in ("busy", "back")}
    assert got["back"] / got["busy"] == pytest.approx(1, abs=0.2)


def test_a_tenant_saves_up_nothing_while_its_cap_holds_it_back():
    target = scheduler(tenants=Tenants.parse({"tenants": {"capped": {"max_running": 1}}}))
    flood(target, "capped", 50, 10, 10)
    flood(target, "busy", 1000, 10, 10)
    traffic = Traffic(target)
    for _ in range(200):
        traffic.step()
    accounts = target.lines.accounts.root.children["standard"].children
    counters = {name: account.served for name, account in accounts.items()}
    assert counters["capped"] >= counters["busy"] - 2 * SEQS * 30
    assert traffic.service["capped"] < traffic.service["busy"] / 4


def test_newcomers_that_never_end_do_not_keep_others_from_their_turn():
    """Each request of a tenant of its own, half as many again as can be served, and one tenant with more than one."""
    target = scheduler()
    traffic, sent, old = Traffic(target), 0, []
    while traffic.now < 60:
        while sent < 1.5 * SEQS / (10 * traffic.step_s) * traffic.now:
            flood(target, f"new {sent}", 1, 10, 10, arrival=traffic.now)
            sent += 1
        if traffic.now > 5 and not old:
            old = flood(target, "old", 4, 10, 10, arrival=traffic.now)
        traffic.step()
    assert all(s.finished for s in old)


@pytest.mark.parametrize("policy", [Policy(), FIRST_COME], ids=["all", "none"])
def test_seats_are_used_as_long_as_anybody_wants_one(policy: Policy):
    target = scheduler(policy)
    flood(target, "a", 30, 10, 10)
    flood(target, "b", 1, 10, 10)
    traffic = Traffic(target)
    while target.waiting:
        wanted = len(target.waiting) + len(target.running)
        assert len(traffic.step().slots) == min(SEQS, wanted)
    assert traffic.tokens > 200


def test_a_low_class_gets_its_share_however_much_a_high_one_asks_for():
    tenants = Tenants.parse(
        {
            "classes": {"high": {"weight": 8}, "low": {"weight": 1}},
            "tenants": {"h": {"class": "high"}, "l": {"class": "low"}},
        }
    )
    target = scheduler(tenants=tenants)
    for tenant in ("l", "h"):
        flood(target, tenant, 600, 10, 10)
    traffic = Traffic(target)
    for _ in range(500):
        traffic.step()
    assert traffic.service["h"] / traffic.service["l"] == pytest.approx(8, rel=0.2)


def test_priorities_in_requests_weigh_four_to_one():
    target = scheduler()
    flood(target, "low", 600, 10, 10)
    flood(target, "high", 600, 10, 10, priority=1)
    traffic = Traffic(target)
    for _ in range(500):
        traffic.step()
    assert traffic.service["high"] / traffic.service["low"] == pytest.approx(4, rel=0.2)


def test_what_is_nearly_late_goes_first_among_its_tenants_own():
    target = scheduler()
    flood(target, "t", SEQS, 10, 10)
    Traffic(target).step()
    patient = add(target, 10, "patient", tenant="t", max_len=20)
    urgent = add(target, 10, "urgent", tenant="t", max_len=20, arrival=0.01, deadline=0.6)
    traffic = Traffic(target)
    traffic.now = 0.2
    while urgent.started is None and patient.started is None:
        target.finish(next(iter(target.running.values())), FinishReason.ABORT)
        traffic.step()
    assert urgent.started is not None
    assert patient.started is None


def test_the_deadline_of_a_class_counts_from_arrival():
    tenants = Tenants.parse({"classes": {"c": {"deadline_s": 2}}, "default": {"class": "c"}})
    assert add(scheduler(tenants=tenants), arrival=5.0).deadline == 7.0
    assert add(scheduler(tenants=tenants), arrival=5.0, deadline=6.0).deadline == 6.0


def test_more_revisions_of_an_adapter_are_no_more_shares():
    target = scheduler(adapters=FakeAdapters())
    for i in range(200):
        for key in ("a", "a@2", "b"):
            add(target, 10, key, i / 1000, max_len=20)
    traffic = Traffic(target)
    for _ in range(200):
        traffic.step()
    both = len(traffic.waits["a"]) + len(traffic.waits["a@2"])
    assert both == pytest.approx(len(traffic.waits["b"]), abs=2 * SEQS)
