# SPDX-License-Identifier: Apache-2.0
"""Who gives up a slot: pure functions of who holds one and who wants one."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.scheduling.tenure import PATIENCE, SECOND, WEIGHTS, Candidate, Flow, Holder, victim

CANDIDATE = Candidate(due=10.0, weight=1.0, share=2.0)


def holder(adapter: str = "a", **values) -> Holder:
    defaults = {"held_s": 3.0, "due": math.inf, "behind": False, "work": 1, "weight": 1.0, "share": 1.0}
    return Holder(adapter=adapter, **{**defaults, **values})


def chosen(*holders: Holder, candidate: Candidate = CANDIDATE, seats: bool = False) -> str | None:
    return victim(holders, candidate, 2.0, seats)


def test_nobody_goes_before_its_tenure_is_over():
    assert chosen(holder(held_s=1.99)) is None
    assert chosen(holder(held_s=2.0)) == "a"


def test_who_has_waited_longer_with_its_own_requests_stays_but_not_for_ever():
    assert chosen(holder(due=9.0)) is None
    assert chosen(holder(due=9.0, held_s=2.0 * PATIENCE)) == "a"
    assert chosen(holder(due=11.0)) == "a"


def test_a_tenant_with_more_slots_gives_one_up_whatever_waits():
    assert chosen(holder(due=9.0, share=2.5)) == "a"
    assert chosen(holder("poor"), holder("rich", share=3.0)) == "rich"


def test_who_could_not_yet_admit_what_had_waited_gets_more_time():
    assert chosen(holder(behind=True)) is None
    assert chosen(holder(behind=True, held_s=2.0 * SECOND)) == "a"


def test_the_batch_keeps_what_fills_it_when_it_has_seats():
    busy, quiet = holder("busy", work=50, due=20.0), holder("quiet", work=1, due=19.0)
    assert chosen(busy, quiet, seats=True) == "quiet"
    assert chosen(busy, quiet, seats=False) == "busy", "without free seats, whose own requests are the youngest"


def test_classes_keep_their_slots_by_weight_within_bounds():
    heavy = Candidate(due=10.0, weight=1000.0, share=2.0)
    assert chosen(holder(held_s=2.0 / WEIGHTS), candidate=heavy) == "a"
    assert chosen(holder(weight=1000.0, held_s=2.0 * WEIGHTS - 0.1)) is None
    assert chosen(holder(weight=1000.0, held_s=2.0 * WEIGHTS)) == "a"


@given(
    st.lists(
        st.builds(
            holder,
            adapter=st.text(max_size=2),
            held_s=st.floats(0, 100),
            due=st.floats(0, 100),
            behind=st.booleans(),
            work=st.integers(0, 9),
            weight=st.floats(0.1, 10),
            share=st.floats(0, 10),
        ),
        max_size=5,
    ),
    st.booleans(),
)
def test_somebody_goes_after_the_longest_patience(holders: list[Holder], seats: bool):
    name = victim(holders, CANDIDATE, 2.0, seats)
    if any(h.held_s >= 2.0 * WEIGHTS * PATIENCE for h in holders):
        assert name is not None
    if name is not None:
        assert max(h.held_s for h in holders if h.adapter == name) >= 2.0 / WEIGHTS


def test_slots_that_become_free_by_themselves_suffice_only_as_long_as_they_do():
    flow = Flow(span_s=4.0)
    for i in range(40):
        flow.count(i * 0.5)  # 8 in a span
    assert flow.suffices(7, 20.0)
    assert not flow.suffices(12, 20.0)
    assert not flow.suffices(7, 30.0)
    assert flow.recent(0.0) == flow.freed, "a clock that goes back changes nothing"
