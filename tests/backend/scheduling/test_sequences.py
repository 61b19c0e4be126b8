# SPDX-License-Identifier: Apache-2.0
"""What is counted when a sequence first runs: each prompt once, whatever happens to it before and after."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.core import FinishReason, Sequence
from multilora_backend.scheduling.scheduler import Scheduler
from profiles import examples
from virtual_scheduler import Traffic, add, make, run


def add_alike(scheduler: Scheduler, length: int, adapter: str = "", **more) -> Sequence:
    """Prompts that begin alike, and so share what is full of them."""
    sequence = add(scheduler, length, adapter, **more)
    sequence.token_ids[:] = range(length)
    return sequence


def counted(scheduler: Scheduler) -> tuple[int, int]:
    return scheduler.pages.queries, scheduler.pages.hits


def test_a_prompt_that_waits_for_pages_is_counted_when_it_gets_them():
    scheduler = make(num_pages=7, page_size=4)
    first = add_alike(scheduler, 9)
    run(scheduler)
    second = add_alike(scheduler, 21)
    for _ in range(5):
        run(scheduler)
        assert counted(scheduler) == (9, 0)
        assert second.started is None
    scheduler.finish(first, FinishReason.LENGTH)
    run(scheduler)
    assert second.started is not None
    assert counted(scheduler) == (9 + 21, 8), "the full pages of what both begin with"


def test_nor_does_it_count_again_after_a_preemption():
    scheduler = make(num_pages=7, page_size=4)
    old, new = add(scheduler, 8), add(scheduler, 8)
    while not run(scheduler).preempted:
        pass
    scheduler.finish(old, FinishReason.LENGTH)
    run(scheduler)
    assert new.num_cached >= 8, "it has found what it had computed itself"
    assert counted(scheduler) == (16, 0)


def test_without_a_cache_nothing_is_looked_up():
    scheduler = make(caching=False)
    add(scheduler, 9)
    run(scheduler)
    assert counted(scheduler) == (0, 0)


@examples(60)
@given(data=st.data())
def test_the_counters_are_what_all_sequences_found_when_they_started(data: st.DataObject):
    scheduler = make(
        num_pages=data.draw(st.integers(14, 30)), seqs=4, tokens=16, max_loras=data.draw(st.integers(0, 1))
    )
    requests = data.draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.sampled_from("ab")), max_size=9))
    late = data.draw(st.integers(0, len(requests)))
    traffic = Traffic(scheduler, step_s=data.draw(st.sampled_from([0.05, 1.5])))
    found: dict[Sequence, int] = {}
    for number, (prompt, output, adapter) in enumerate(requests):
        if number >= late:
            traffic.step()
        found[add_alike(scheduler, prompt, adapter.strip("a"), max_len=prompt + output)] = -1
        found |= {s: s.num_cached for s, hits in found.items() if hits < 0 and s.started is not None}
    while scheduler.has_work:
        traffic.step()
        found |= {s: s.num_cached for s, hits in found.items() if hits < 0 and s.started is not None}
        assert counted(scheduler) == (
            sum(s.prompt_len for s, hits in found.items() if hits >= 0),
            sum(hits for hits in found.values() if hits >= 0),
        )
