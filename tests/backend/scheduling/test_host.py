# SPDX-License-Identifier: Apache-2.0
"""KV pages on the host: when moving pays, places that are used once, and sequences that go on where they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.core import FinishReason, PageMove, SequenceStatus
from multilora_backend.scheduling.host import HostPages, moving_pays
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.scheduler import Scheduler
from profiles import examples
from virtual_scheduler import FakeAdapters, Traffic, add, make, run

KIB = 1024


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing were too short for it."""
    monkeypatch.setattr("multilora_backend.scheduling.host.OVERHEAD_S", 0.0)


def test_moving_pays_from_some_length_on_and_never_where_computing_is_as_fast():
    assert not moving_pays(80, 128 * KIB)
    assert moving_pays(82, 128 * KIB)
    assert not moving_pays(100_000, 600 * KIB)
    assert not moving_pays(0, 0)


def scheduler(host: int, **settings) -> Scheduler:
    target = make(caching=False, **settings)
    target._memory.host = target.host = HostPages(host, 1)
    return target


def test_a_preempted_sequence_goes_on_where_it_was(always):
    target = scheduler(10, num_pages=7, page_size=4)
    old, new = add(target, 8), add(target, 8)
    plans = []
    while not (plans and plans[-1].preempted):
        plans.append(run(target))
    computed, out = new.host_computed, plans[-1].moves
    assert computed == new.num_tokens - 1
    assert [move.to_host for move in out] == [True]
    assert len(out[0].pages) == len(out[0].places) == -(-computed // 4)
    assert not new.pages
    target.finish(old, FinishReason.LENGTH)
    plan = run(target)
    assert [(slot.start, slot.count) for slot in plan.slots] == [(computed, 1)]
    assert plan.moves == (PageMove(tuple(new.pages[: len(out[0].pages)]), out[0].places, to_host=False),)
    assert target.host.num_free == 10
    assert not new.setbacks


@pytest.mark.parametrize("host", [0, 1])
def test_without_room_on_the_host_it_is_computed_again(always, host: int):
    target = scheduler(host, num_pages=7, page_size=4)
    old, new = add(target, 8), add(target, 8)
    while not (plan := run(target)).preempted:
        pass
    assert not plan.moves
    target.finish(old, FinishReason.LENGTH)
    assert run(target).slots[0].start == 0
    assert new.status is SequenceStatus.RUNNING


@pytest.mark.parametrize("host", [0, 10])
def test_what_the_host_keeps_is_not_lost(always, host: int):
    target = scheduler(host, num_pages=20, page_size=4, tokens=8)
    sequence = add(target, 30)
    run(target)
    target._sequences.preempt(sequence)
    assert sequence.setbacks == (not host)
    assert run(target).slots[0].start == (8 if host else 0)


def test_what_ends_while_its_pages_are_on_the_host_frees_them(always):
    target = scheduler(10, num_pages=7, page_size=4)
    add(target, 8)
    new = add(target, 8)
    while not run(target).preempted:
        pass
    assert target.host.num_free < 10
    target.finish(new, FinishReason.ABORT)
    assert target.host.num_free == 10


def test_another_version_of_the_adapter_does_not_get_the_pages_of_the_old_one(always):
    adapters = FakeAdapters()
    target = scheduler(10, num_pages=7, page_size=4, adapters=adapters)
    old, new = add(target, 8, "a"), add(target, 8, "a")
    while not run(target).preempted:
        pass
    new.root = b"another"
    target.finish(old, FinishReason.LENGTH)
    plan = run(target)
    assert not plan.moves
    assert plan.slots[0].start == 0
    assert target.host.num_free == 10


def test_nor_do_paused_sequences_keep_them():
    target = make(policy=Policy(tenure_s=0.1), caching=False)
    sequence = add(target, 8, "a")
    run(target)
    target._sequences.pause(target.turns.holders["a"], 9.0)
    sequence.root = b"another"
    assert run(target, 9.0).slots[0].start == 0


def test_pages_that_the_prefix_cache_still_has_are_not_copied(always):
    target = make(num_pages=7, page_size=4)
    target._memory.host = target.host = HostPages(10, 1)
    old, new = add(target, 8), add(target, 8)
    while not run(target).preempted:
        pass
    target.finish(old, FinishReason.LENGTH)
    computed = new.host_computed
    plan = run(target)
    assert new.num_cached >= 4
    assert plan.slots[0].start == computed
    copied = sum(len(move.pages) for move in plan.moves)
    assert copied == -(-computed // 4) - new.num_cached // 4


@examples(30)
@given(data=st.data())
def test_every_page_comes_back_with_what_it_held(data: st.DataObject):
    """Carries plans out on two dicts of pages: whatever a step reads was written for that sequence and position."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multilora_backend.scheduling.host.OVERHEAD_S", 0.0)
        shape = {"num_pages": data.draw(st.integers(14, 30)), "page_size": 4, "seqs": 6, "tokens": 16, "max_loras": 1}
        target = make(**shape, caching=data.draw(st.booleans()))
        target._memory.host = target.host = HostPages(data.draw(st.integers(0, 30)), 1)
        requests = data.draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 2)), max_size=9))
        for prompt, output, adapter in requests:
            add(target, prompt, ("", "a", "b")[adapter], max_len=prompt + output)
        traffic = Traffic(target, step_s=data.draw(st.sampled_from([0.05, 1.5])))
        device: dict[tuple[int, int], tuple] = {}
        host: dict[tuple[int, int], tuple] = {}
        original = target.schedule

        def carried_out(now: float):
            plan = original(now)
            for move in plan.moves:
                for page, place in zip(move.pages, move.places, strict=True):
                    for i in range(4):
                        if move.to_host:
                            host[place, i] = device.get((page, i), ())
                        else:
                            device[page, i] = host.get((place, i), ())
            for slot in plan.slots:
                sequence = slot.sequence
                for at in range(slot.start, slot.start + slot.count):
                    device[sequence.pages[at // 4], at % 4] = (sequence.key, sequence.adapter, at)
                for at in range(sequence.num_computed):
                    assert device[sequence.pages[at // 4], at % 4] == (sequence.key, sequence.adapter, at)
            return plan

        patch.setattr(target, "schedule", carried_out)
        while target.has_work:
            traffic.step()
            assert traffic.now < 3000
        assert target.host.num_free == target.host.num_pages
        assert target.pages.num_free == shape["num_pages"] - 1
