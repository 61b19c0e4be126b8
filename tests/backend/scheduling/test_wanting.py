# SPDX-License-Identifier: Apache-2.0
"""Who is next for a slot: the heaps against sorting all, with tenants that are parked and lines that change."""

from __future__ import annotations

import math

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from multilora_backend.scheduling.accounts import Account
from multilora_backend.scheduling.lines import Line
from multilora_backend.scheduling.quotas import Quota
from multilora_backend.scheduling.tenants import SlaClass, Tenant
from multilora_backend.scheduling.wanting import Wanting
from profiles import examples

TENANTS = {name: Quota(Tenant(name, weight=weight)) for name, weight in (("a", 1.0), ("b", 2.0), ("c", 1.0))}
PATH = (Account(), Account())
CAPPED = Quota(Tenant("capped", max_running=1))


class WantingMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.wanting = Wanting()
        CAPPED.running = 0
        quotas = [*TENANTS.values(), CAPPED]
        self.lines = [Line(SlaClass(), quotas[i % len(quotas)], f"adapter {i}", PATH) for i in range(12)]
        self.due: dict[Line, float] = {}
        self.slots = dict.fromkeys([*TENANTS, "capped"], 0)

    @rule(i=st.integers(0, 11), due=st.integers(0, 20))
    def push(self, i: int, due: int) -> None:
        self.due[self.lines[i]] = float(due)
        self.wanting.push(self.lines[i], float(due))

    @rule(i=st.integers(0, 11))
    def withdraw(self, i: int) -> None:
        self.due.pop(self.lines[i], None)
        self.wanting.withdraw(self.lines[i])

    @rule(tenant=st.sampled_from([*TENANTS, "capped"]))
    def took(self, tenant: str) -> None:
        self.slots[tenant] += 1
        self.wanting.took(tenant)

    @rule(tenant=st.sampled_from([*TENANTS, "capped"]))
    def gave(self, tenant: str) -> None:
        if self.slots[tenant]:
            self.slots[tenant] -= 1
            self.wanting.gave(tenant)

    @rule(running=st.integers(0, 1))
    def cap(self, running: int) -> None:
        CAPPED.running = running
        if not running:
            self.wanting.unpark("capped")

    @rule(limit=st.integers(1, 12))
    def pop(self, limit: int) -> None:
        able = {line: due for line, due in self.due.items() if line.quota is not CAPPED or not CAPPED.running}
        slots, expected = dict(self.slots), []
        while able and len(expected) < limit:
            key = {line: (slots[line.tenant] / line.quota.tenant.weight, due) for line, due in able.items()}
            best = min(able, key=key.__getitem__)
            expected.append(key[best])
            able.pop(best)
            slots[best.tenant] += 1
        got, slots = self.wanting.pop(limit, 0.0), dict(self.slots)
        found = []
        for line in got:
            found.append((slots[line.tenant] / line.quota.tenant.weight, self.due[line]))
            slots[line.tenant] += 1
        assert found == expected
        for line in got:
            assert not line.entry
            self.wanting.push(line, self.due[line])

    @invariant()
    def it_knows_whether_anybody_wants_one(self) -> None:
        assert bool(self.wanting) == bool(self.due)


WantingMachine.TestCase.settings = examples(60, stateful_step_count=40)
TestWantingMachine = WantingMachine.TestCase


def test_a_tenant_that_waits_for_its_bucket_is_left_out_until_then():
    wanting = Wanting()
    quota = Quota(Tenant("slow", tokens_per_s=10.0))
    quota.charge(30, 0.0)
    line = Line(SlaClass(), quota, "adapter", PATH)
    wanting.push(line, 1.0)
    assert wanting.pop(4, 1.0) == []
    assert wanting.pop(4, 1.9) == []
    assert wanting.pop(4, 2.2) == [line]


def test_old_entries_do_not_pile_up():
    wanting = Wanting()
    lines = [Line(SlaClass(), TENANTS["a"], f"adapter {i}", PATH) for i in range(10)]
    for now in range(1000):
        for line in lines:
            wanting.push(line, float(now))
        for line in wanting.pop(3, float(now)):
            wanting.push(line, line.due)
    assert len(wanting._heaps["a"]) < 100
    assert len(wanting._slotless) < 100
    assert not math.isinf(lines[0].due)
