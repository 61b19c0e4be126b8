# SPDX-License-Identifier: Apache-2.0
"""The order of admissions against ranking all lines anew before each of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.scheduling.accounts import charge
from multilora_backend.scheduling.lines import Line
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.ready import Ready
from multilora_backend.scheduling.tenants import Tenants
from profiles import examples
from virtual_scheduler import add, make

TENANTS = Tenants.parse({"tenants": {"t0": {"weight": 3}}})


@examples(60)
@given(data=st.data())
def test_the_first_line_is_always_the_one_with_the_least_rank(data: st.DataObject):
    policy = Policy(fair_share=data.draw(st.booleans()), priority=data.draw(st.booleans()))
    scheduler = make(policy=policy, tenants=TENANTS)
    for _ in range(data.draw(st.integers(1, 25))):
        adapter = data.draw(st.sampled_from(["", "a", "a@2", "b"]))
        add(
            scheduler,
            adapter=adapter,
            arrival=data.draw(st.integers(0, 9)),
            tenant=f"t{data.draw(st.integers(0, 3))}",
            priority=data.draw(st.integers(-1, 1)),
            deadline=data.draw(st.sampled_from([0.2, 99.0])),
        )
    lines = [line for of in scheduler.lines.waiting_by_adapter.values() for line in of]
    ready, left = Ready(lines, policy, 0.0), list(lines)
    for _ in range(60):
        line = ready.first()
        if line is None:
            break
        assert policy.rank(line, 0.0) == min(policy.rank(other, 0.0) for other in left)
        charge(line.path, data.draw(st.integers(1, 20)))
        sequence = line.head
        scheduler.lines.take(sequence)
        if not line.waiting or data.draw(st.booleans()):
            ready.drop()
            left.remove(line)
    assert not left or ready.first() is not None


def test_an_admission_ranks_a_few_lines_and_not_all(monkeypatch: pytest.MonkeyPatch):
    """Every admission changes the counter of all lines' class: 256 times 2,000 ranks, when each of them ranked all."""
    rank, ranked = Policy.line_rank, []

    def counted(self: Policy, line: Line, now: float) -> tuple[float, ...]:
        ranked.append(line)
        return rank(self, line, now)

    monkeypatch.setattr(Policy, "line_rank", counted)
    scheduler = make(num_pages=5000, seqs=256, tokens=2048, policy=Policy())
    for i in range(4000):
        add(scheduler, 2, tenant=f"t{i % 2000}")
    assert len(scheduler.schedule(0.0).slots) == 256
    assert 2000 <= len(ranked) < 2000 + 256 * 10
