# SPDX-License-Identifier: Apache-2.0
"""Pausing: who may be stopped and when, and whose pages go for whom."""

from __future__ import annotations

import pytest

from multilora_backend.core import FinishReason, SequenceStatus
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.tenure import PATIENCE
from virtual_scheduler import Traffic, add, make, run

EAGER = Policy(tenure_s=0.1, max_overtake_s=0.0)


def test_nobody_is_paused_before_it_has_sampled_something_in_its_turn():
    scheduler = make(tokens=8, policy=EAGER, num_pages=1000)
    sequence = add(scheduler, 12, "a", max_len=500)
    scheduler.schedule(0.0)
    turn = scheduler.turns.holders["a"]
    assert not scheduler._sequences.pause(turn, 99.0)
    assert sequence.status is SequenceStatus.RUNNING
    run(scheduler, 0.1)
    assert scheduler._sequences.pause(turn, 99.0)
    assert sequence.status is SequenceStatus.PAUSED


def test_with_pages_short_it_is_paused_when_patience_ends():
    scheduler = make(num_pages=6, page_size=4, policy=EAGER)
    add(scheduler, 13, "a", max_len=500)
    run(scheduler, 0.0)
    turn = scheduler.turns.holders["a"]
    assert not scheduler._sequences.pause(turn, PATIENCE * 0.1 - 0.01)
    assert scheduler._sequences.pause(turn, PATIENCE * 0.1)


def test_a_long_request_is_left_alone_where_slots_turn_over_by_themselves():
    policy = Policy(tenure_s=1.0, max_overtake_s=0.1)
    traffic = Traffic(make(max_loras=3, seqs=24, num_pages=1000, policy=policy))
    for i in range(60):
        add(traffic.scheduler, 4, f"a{i}", max_len=14)
    while traffic.now < 3:
        traffic.step()
    long = add(traffic.scheduler, 4, "long", max_len=64)
    while not long.finished:
        traffic.step()
    assert traffic.scheduler.pauses == 0


@pytest.mark.parametrize("base", [False, True])
def test_a_turn_takes_pages_of_paused_sequences_for_its_first_one_only(base: bool):
    """Three of `a` have four pages each and may keep them, but for what one of `b` needs to begin."""
    scheduler = make(max_loras=1, num_pages=17 if base else 16, page_size=4, policy=EAGER, caching=False)
    runs = [add(scheduler, 5, max_len=500)] if base else []
    old = [add(scheduler, 13, "a", max_len=500) for _ in range(3)]
    run(scheduler, 0.0)
    run(scheduler, 0.05)
    new = [add(scheduler, 13, "b", 0.05, max_len=500) for _ in range(3)]
    run(scheduler, 1.0)
    assert [s.status is SequenceStatus.RUNNING for s in new] == [True, False, False]
    assert [bool(s.pages) for s in old] == [True, True, False]
    assert all(s.status is SequenceStatus.RUNNING for s in runs)


def test_what_was_turned_out_for_somebody_drains_and_takes_nobody_in():
    """Pages are short, so that nobody is paused: a slot that is promised goes to whom it was promised to."""
    scheduler = make(max_loras=1, num_pages=7, page_size=4, policy=Policy(tenure_s=1.0, max_overtake_s=0.0))
    runs = add(scheduler, 13, "a", max_len=500)
    run(scheduler, 0.0)
    waits = add(scheduler, 4, "b", 0.1)
    run(scheduler, 1.1)
    assert (runs.status, scheduler.turns.holders["a"].closing) == (SequenceStatus.RUNNING, True)
    late = add(scheduler, 4, "a", 1.2)
    run(scheduler, 1.2)
    assert late.started is None
    scheduler.finish(runs, FinishReason.ABORT)
    run(scheduler, 1.3)
    assert waits.started == 1.3
    assert late.started is None


def test_a_slot_that_nobody_needs_any_more_is_kept():
    scheduler = make(max_loras=1, num_pages=7, page_size=4, policy=Policy(tenure_s=1.0, max_overtake_s=0.0))
    add(scheduler, 13, "a", max_len=500)
    run(scheduler, 0.0)
    waits = add(scheduler, 4, "b", 0.1)
    run(scheduler, 1.1)
    scheduler.finish(waits, FinishReason.ABORT)
    late = add(scheduler, 4, "a", 1.2)
    run(scheduler, 1.2)
    assert late.started == 1.2


def test_a_paused_sequence_does_not_lose_its_own_pages_to_itself():
    scheduler = make(num_pages=9, page_size=4, policy=EAGER, max_loras=1, caching=False)
    first, second = (add(scheduler, 9, "a", max_len=500) for _ in range(2))
    run(scheduler)
    scheduler._sequences.pause(scheduler.turns.holders["a"], 99.0)
    assert list(scheduler.paused) == [first.key, second.key]
    second.token_ids += range(14)  # more than the free pages hold, as if they had become fewer
    assert scheduler._memory.extend(second, second.num_tokens, take_back=True)
    assert second.pages
    assert not first.pages


def test_who_cannot_go_on_yet_for_want_of_a_page_keeps_those_that_it_has():
    scheduler = make(num_pages=6, page_size=4, policy=EAGER, caching=False)
    paused = add(scheduler, 15, "a", max_len=500)
    run(scheduler, 0.0)
    scheduler._sequences.pause(scheduler.turns.holders["a"], 99.0)
    base = add(scheduler, 4, max_len=500)
    assert scheduler.pages.extend(base, 4)
    paused.token_ids.append(7)  # so that it needs a fifth page
    run(scheduler, 1.0)
    assert (paused.status, len(paused.pages), paused.lease) == (SequenceStatus.PAUSED, 4, None)
