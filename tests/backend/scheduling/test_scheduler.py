# SPDX-License-Identifier: Apache-2.0
"""The scheduler in virtual time, with adapters that load when the test says so and a model that is not there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.core import UNKNOWN_TOKEN, FinishReason, SequenceStatus
from multilora_backend.scheduling.batch import SETBACKS, take_victim
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.tenants import Tenants
from profiles import examples
from virtual_scheduler import FIRST_COME, FakeAdapters, Traffic, add, make, names, run


def test_different_adapters_and_the_base_share_a_step():
    scheduler = make()
    for adapter in ("a", "", "b", "a"):
        add(scheduler, adapter=adapter)
    plan = run(scheduler)
    assert sorted(names(plan)) == ["", "a", "a", "b"]
    assert plan.adapters == {"a", "b"}


def test_a_long_prompt_is_cut_into_chunks_and_decodes_go_on():
    scheduler = make(tokens=10)
    short = add(scheduler, 3)
    run(scheduler)
    long = add(scheduler, 25)
    plans = [run(scheduler) for _ in range(3)]
    assert [[(s.sequence is long, s.start, s.count, s.samples) for s in p.slots] for p in plans] == [
        [(False, 3, 1, True), (True, 0, 9, False)],
        [(False, 4, 1, True), (True, 9, 9, False)],
        [(False, 5, 1, True), (True, 18, 7, True)],
    ]
    assert short.num_output_tokens == 4


def test_decoding_sequences_are_served_before_chunks_of_prompts():
    scheduler = make(tokens=10)
    long, short = add(scheduler, 5), add(scheduler, 3)
    run(scheduler)
    long.token_ids += range(30)  # as if it had been preempted with a long output and admitted again
    plan = run(scheduler)
    assert [(slot.sequence is short, slot.count) for slot in plan.slots] == [(True, 1), (False, 9)]


def test_the_newest_sequence_is_preempted_and_finishes_later():
    scheduler = make(num_pages=7, page_size=4, caching=False)
    old, new = add(scheduler, 8), add(scheduler, 8)
    preempted = []
    for _ in range(9):
        preempted += run(scheduler).preempted
    assert new in preempted
    assert old not in preempted
    assert new.status is SequenceStatus.WAITING
    scheduler.finish(old, FinishReason.LENGTH)
    run(scheduler)
    assert new.status is SequenceStatus.RUNNING
    assert new.num_computed == new.num_tokens - 1, "what it had said before is computed again with the prompt"


def test_a_high_priority_sequence_is_preempted_last():
    scheduler = make(num_pages=7, page_size=4, caching=False)
    low, high = add(scheduler, 8), add(scheduler, 8, priority=1)
    preempted = []
    for _ in range(9):
        preempted += run(scheduler).preempted
    assert low in preempted
    assert high not in preempted


def test_a_load_holds_up_nobody_else():
    adapters = FakeAdapters(instant=False)
    scheduler = make(adapters=adapters, policy=FIRST_COME)
    cold, base = add(scheduler, adapter="cold"), add(scheduler, arrival=1.0)
    assert names(run(scheduler)) == [""]
    assert cold.status is SequenceStatus.WAITING_ADAPTER
    adapters.land()
    assert sorted(names(run(scheduler))) == ["", "cold"]
    assert base.num_output_tokens == 2


def test_max_loras_bounds_the_adapters_of_a_step_but_not_the_base():
    scheduler = make(max_loras=2)
    for adapter in ("a", "b", "c", "", "a"):
        add(scheduler, adapter=adapter)
    assert sorted(names(run(scheduler))) == ["", "a", "a", "b"]


def test_an_overdue_request_gets_a_slot_though_the_running_adapter_never_runs_dry():
    scheduler = make(max_loras=1, seqs=4)
    queue = [add(scheduler, adapter="a")]
    starved = add(scheduler, adapter="b")
    now = 0.0
    while starved.status is not SequenceStatus.RUNNING and now < 60:
        now += 1.0
        run(scheduler, now)
        queue.append(add(scheduler, adapter="a", arrival=now))
        for s in [s for s in queue if s.num_output_tokens >= 3]:
            queue.remove(s)
            scheduler.finish(s, FinishReason.LENGTH)
    assert now <= 5.0 + 4, "max_overtake_s, and then as long as the running requests need"


def test_an_overdue_request_gets_device_room_though_all_of_it_is_leased_again_and_again():
    scheduler = make(adapters=FakeAdapters(room=1), seqs=4)
    queue = [add(scheduler, adapter="a")]
    starved = add(scheduler, adapter="b")
    now = 0.0
    while starved.status is not SequenceStatus.RUNNING and now < 60:
        now += 1.0
        run(scheduler, now)
        queue.append(add(scheduler, adapter="a", arrival=now))
        for s in [s for s in queue if s.num_output_tokens >= 3]:
            queue.remove(s)
            scheduler.finish(s, FinishReason.LENGTH)
    assert now <= 5.0 + 4


def test_resident_adapters_go_first_and_priority_before_that():
    adapters = FakeAdapters(instant=False)
    adapters.active = ["warm", "vip"]
    scheduler = make(adapters=adapters, seqs=1)
    order = []
    add(scheduler, adapter="cold", arrival=0.0)
    add(scheduler, adapter="warm", arrival=1.0)
    add(scheduler, adapter="vip", arrival=2.0, priority=1)
    for _ in range(3):
        plan = run(scheduler, now=2.0)
        order += names(plan)
        if len(order) == 2:
            adapters.land()
        scheduler.finish(plan.slots[0].sequence, FinishReason.STOP)
    assert order == ["vip", "warm", "cold"]


def test_kv_pages_are_shared_within_an_adapter_only():
    scheduler = make()
    prompt = list(range(12))
    found = []
    for adapter in ("a", "b", "a", "", ""):
        s = add(scheduler, 12, adapter=adapter)
        s.token_ids[:] = prompt
        run(scheduler)
        found.append(s.num_cached)
    assert found == [0, 0, 8, 0, 8]


def test_a_sequence_whose_last_token_is_on_its_way_computes_nothing_and_gives_way_to_nobody():
    """With steps that overlap, the last token is known to be the last before it is known."""
    scheduler = make(num_pages=4, page_size=4)
    last, other = add(scheduler, 4, max_len=5), add(scheduler, 4)
    scheduler.schedule(0.0)
    for sequence in (last, other):
        sequence.token_ids.append(UNKNOWN_TOKEN)
    plan = scheduler.schedule(0.0)
    assert [slot.sequence for slot in plan.slots] == [other]
    assert not plan.preempted
    other.token_ids += [7, 7, 7, 7]
    plan = scheduler.schedule(0.0)
    assert plan.preempted == (other,), "there is no page left, and the other one needs none"
    assert last.status is SequenceStatus.RUNNING
    scheduler.finish(last, FinishReason.LENGTH)
    scheduler.finish(other, FinishReason.ABORT)
    assert scheduler.pages.num_free == 3


def test_a_prompt_gets_the_pages_of_all_its_chunks_when_it_is_admitted():
    """What decodes meanwhile would take those of the next chunk."""
    scheduler = make(page_size=4, tokens=8)
    long = add(scheduler, 21)
    run(scheduler)
    assert (long.num_computed, len(long.pages)) == (8, 6)


def test_a_step_has_no_more_tokens_than_it_may():
    scheduler = make(tokens=3)
    for length in (1, 5, 1, 2, 1, 1):
        add(scheduler, length)
    for _ in range(12):
        assert run(scheduler).num_tokens <= 3


def test_who_lost_its_pages_twice_for_nothing_keeps_them_until_it_has_said_something():
    first, second, third = (add(make(), 30) for _ in range(3))
    third.setbacks = SETBACKS
    queue = [first, second, third]
    assert take_victim(queue, 1) is second
    assert queue == [first, third]
    assert take_victim(queue, 1) is None
    scheduler = make(num_pages=9, page_size=4, tokens=8, caching=False)
    sequence = add(scheduler, 20)
    for setbacks in (1, 2):
        run(scheduler)
        scheduler._sequences.preempt(sequence)
        assert sequence.setbacks == setbacks
    while not sequence.num_output_tokens:
        run(scheduler)
    scheduler._sequences.preempt(sequence)
    assert not sequence.setbacks


def test_a_low_class_gets_on_though_pages_are_short_and_a_high_one_never_stops():
    classes = {"high": {"weight": 8}, "low": {"weight": 1}}
    tenants = Tenants.parse({"classes": classes, "tenants": {"h": {"class": "high"}, "l": {"class": "low"}}})
    traffic = Traffic(make(num_pages=45, seqs=16, tokens=20, policy=Policy(), tenants=tenants, caching=False))
    low = add(traffic.scheduler, 120, tenant="l", max_len=140)
    while not low.finished:
        while traffic.scheduler.lines.quota("h", traffic.now).waiting < 8:
            add(traffic.scheduler, 4, tenant="h", max_len=40, arrival=traffic.now)
        traffic.step()
        assert traffic.now < 60
    assert traffic.scheduler.preemptions > 10


@examples(30)
@given(data=st.data())
def test_every_request_ends_whatever_the_clock_does_and_one_pass_plans_what_the_long_way_does(data: st.DataObject):
    """Two schedulers with the same requests and times; one never takes the short way through what decodes."""
    requests = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2)), max_size=12))
    shape = {"num_pages": data.draw(st.integers(17, 40)), "seqs": 6, "tokens": data.draw(st.integers(4, 40))}
    now, plans = 0.0, []
    jumps = data.draw(st.lists(st.sampled_from([0.1, 0.1, 1.0, -5.0, 1e6, -1e6]), min_size=1, max_size=30))
    for short in (True, False):
        scheduler = make(**shape, max_loras=1, caching=False)
        numbers = {add(scheduler, p, ("", "a", "b")[a], max_len=p + o).key: i for i, (p, o, a) in enumerate(requests)}
        traffic, seen = Traffic(scheduler), []
        with pytest.MonkeyPatch.context() as patch:
            if not short:
                patch.setattr("multilora_backend.scheduling.scheduler.decode", lambda running, *_: running)
            for step in range(3000):
                if not scheduler.has_work:
                    break
                plan = traffic.step()
                seen.append(sorted((numbers[s.sequence.key], s.start, s.count, s.samples) for s in plan.slots))
                now += jumps[step % len(jumps)] if step < 100 else 0.1
                traffic.now = now
        assert not scheduler.has_work
        assert scheduler.pages.num_free == shape["num_pages"] - 1
        plans.append(seen)
        now = 0.0
    assert plans[0] == plans[1]
