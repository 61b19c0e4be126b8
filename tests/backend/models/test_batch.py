# SPDX-License-Identifier: Apache-2.0
"""A step's flat arrays, against the plain rules for each token: where it comes from, sits, and is written."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.adapters.state import Lease
from multilora_backend.core import UNKNOWN_TOKEN, SamplingParams, Sequence, Slot, StepPlan
from multilora_backend.models.batch import Batch
from multilora_backend.scheduling.pages import TRASH_PAGE

INTS = [field.name for field in fields(Batch) if field.name not in ("sample_slots", "page_size")]


@dataclass(frozen=True)
class Step:
    plan: StepPlan
    page_size: int
    previous: dict[tuple[str, int, int], int]


@st.composite
def steps(draw: st.DrawFn, decode: bool = False) -> Step:
    """Chunks of prompts and decodes in any order, some of whose newest tokens only the device knows."""
    page_size = draw(st.sampled_from([1, 3, 4, 16]))
    count = draw(st.integers(1, 7))
    rows = draw(st.permutations(range(count)))
    # Not drawn one by one: where pages lie is no reason for a smaller example.
    free = random.Random(draw(st.integers(0, 9))).sample(range(1, 300), 299)
    slots, previous = [], {}
    for number in range(count):
        length = draw(st.integers(1, 40))
        start = length - 1 if decode else draw(st.integers(0, length - 1))
        stop = length if decode else draw(st.integers(start + 1, length))
        sequence = Sequence(("f", number, 0), 1, [100 * number + i for i in range(length)], SamplingParams(), 0)
        # It may hold more pages than the step's rows need, for the tokens to come.
        held = -(-stop // page_size) + draw(st.integers(0, 2))
        sequence.pages, free = free[:held], free[held:]
        if (adapter := draw(st.integers(-1, 3))) >= 0:
            sequence.lease = Lease("a", "v", adapter, 0, 8, 1)
        if stop == length > 1 and draw(st.booleans()):
            sequence.token_ids[-1] = UNKNOWN_TOKEN
            previous[sequence.key] = rows[number]
        slots.append(Slot(sequence, start, stop - start, samples=stop == length))
    return Step(StepPlan(tuple(slots)), page_size, previous)


@given(steps())
def test_every_row_is_where_the_plan_has_it(step: Step):
    batch = Batch.from_plan(step.plan, step.page_size, step.previous)
    assert all(getattr(batch, name).dtype == np.int32 for name in INTS)
    row = 0
    for i, slot in enumerate(step.plan.slots):
        sequence = slot.sequence
        assert batch.row_starts[i] == row
        stop = slot.start + slot.count
        assert batch.context_lens[i] == stop
        own_pages = batch.pages[batch.page_starts[i] : batch.page_starts[i + 1]].tolist()
        assert own_pages == sequence.pages[: -(-stop // step.page_size)]
        for position in range(slot.start, stop):
            token = sequence.token_ids[position]
            unknown = token == UNKNOWN_TOKEN
            page = sequence.pages[position // step.page_size]
            assert batch.positions[row] == position
            assert batch.token_ids[row] == (0 if unknown else token)
            assert batch.sources[row] == (step.previous[sequence.key] if unknown else -1)
            assert batch.write_slots[row] == page * step.page_size + position % step.page_size
            assert batch.adapter_slots[row] == (-1 if sequence.lease is None else sequence.lease.slot)
            row += 1
    assert batch.num_rows == row == batch.row_starts[-1] == len(batch.write_slots)
    assert batch.page_starts[-1] == len(batch.pages)
    sampling = [i for i, slot in enumerate(step.plan.slots) if slot.samples]
    assert batch.sample_slots == sampling
    assert batch.sample_rows.tolist() == [batch.row_starts[i + 1] - 1 for i in sampling]
    assert batch.one_row_each == all(slot.count == 1 for slot in step.plan.slots)


@given(st.one_of(steps(), steps(decode=True)), st.integers(0, 40), st.booleans())
def test_padding_adds_rows_that_touch_only_the_trash_page(step: Step, more: int, one_row_each: bool):
    batch = Batch.from_plan(step.plan, step.page_size, step.previous)
    rows, slots = batch.num_rows, len(batch.context_lens)
    padded = batch.padded(rows + more, one_row_each)
    assert padded.num_rows == rows + more
    for name in INTS:
        before, after = getattr(batch, name), getattr(padded, name)
        assert after.dtype == np.int32
        assert np.array_equal(after[: len(before)], before), name
    assert np.array_equal(padded.sample_rows, batch.sample_rows), "nobody samples padding"
    assert padded.sample_slots == batch.sample_slots
    if one_row_each:  # then a decode step stays one, so that the same kernels serve it
        assert padded.one_row_each == batch.one_row_each
    assert len(padded.context_lens) - slots == (more if one_row_each else min(more, 1))
    row = rows
    for slot in range(slots, len(padded.context_lens)):
        length = padded.context_lens[slot]
        assert padded.row_starts[slot : slot + 2].tolist() == [row, row + length]
        own_pages = padded.pages[padded.page_starts[slot] : padded.page_starts[slot + 1]].tolist()
        assert own_pages == [TRASH_PAGE] * -(-length // step.page_size)
        assert padded.positions[row : row + length].tolist() == list(range(length))
        row += length
    assert row == rows + more == padded.row_starts[-1]
    assert padded.page_starts[-1] == len(padded.pages)
    assert set(padded.write_slots[rows:] // step.page_size) <= {TRASH_PAGE}
    assert not padded.token_ids[rows:].any()
    assert (padded.sources[rows:] == -1).all()
    assert (padded.adapter_slots[rows:] == -1).all()


@given(steps(), st.integers(0, 9))
def test_more_samples_are_of_a_row_that_exists(step: Step, more: int):
    batch = Batch.from_plan(step.plan, step.page_size, step.previous)
    wanted = len(batch.sample_rows)
    sampling = batch.sampling(wanted + more)
    assert sampling.sample_rows.dtype == np.int32
    assert sampling.sample_rows.tolist() == batch.sample_rows.tolist() + [0] * more
    assert sampling.sample_slots == batch.sample_slots
    assert len(batch.sample_rows) == wanted, "the batch itself stays as it is"


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_an_idle_step_is_one_sequence_in_the_trash_page(rows: int, page_size: int):
    batch = Batch.idle(rows, page_size)
    assert all(getattr(batch, name).dtype == np.int32 for name in INTS)
    assert batch.positions.tolist() == list(range(rows))
    assert set(batch.write_slots // page_size) == {TRASH_PAGE}
    assert set(batch.pages) == {TRASH_PAGE}
    assert len(batch.pages) == batch.page_starts[-1] == -(-rows // page_size)
    assert (batch.row_starts.tolist(), batch.context_lens.tolist()) == ([0, rows], [rows])
    assert set(batch.adapter_slots) == set(batch.sources) == {-1}
    assert (batch.sample_rows.tolist(), batch.sample_slots) == ([rows - 1], [0])
    assert batch.one_row_each == (rows == 1)


def test_a_token_that_nobody_has_drawn_is_an_error():
    sequence = Sequence(("f", 0, 0), 1, [5, UNKNOWN_TOKEN], SamplingParams(), 0)
    sequence.pages = [1]
    with pytest.raises(KeyError):
        Batch.from_plan(StepPlan((Slot(sequence, 1, 1, True),)), 4, {("f", 1, 0): 0})
