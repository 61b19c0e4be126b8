# SPDX-License-Identifier: Apache-2.0
"""What is loaded into the static buffer is what its views show, whatever was in it before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_models import DEVICES
from multilora_backend.core import SamplingParams, Sequence, Slot, StepPlan
from multilora_backend.models.batch import Batch
from multilora_backend.models.inputs import StepInputs
from multilora_kernels import SegmentPlan, max_packed, max_tiles, plan_segments

PAGE = 4
MAX_ROWS, MAX_SLOTS, MAX_PAGES = 40, 9, 70
MAX_TILES = max_tiles(MAX_ROWS, MAX_SLOTS + 1, 16)
MAX_SEGMENTS = max_packed(MAX_ROWS, MAX_SLOTS + 1)
SIZES = {
    "token_ids": MAX_ROWS,
    "sources": MAX_ROWS,
    "positions": MAX_ROWS,
    "write_slots": MAX_ROWS,
    "sample_rows": MAX_SLOTS,
    "row_starts": MAX_SLOTS + 1,
    "page_starts": MAX_SLOTS + 1,
    "last_page_lens": MAX_SLOTS,
    "segments": MAX_SEGMENTS,
    "pages": MAX_PAGES,
}


@pytest.fixture(params=DEVICES)
def inputs(request: pytest.FixtureRequest) -> StepInputs:
    return StepInputs(MAX_ROWS, MAX_SLOTS, MAX_SEGMENTS, MAX_PAGES, torch.device(request.param))


def batch_of(*slots: tuple[int, int]) -> Batch:
    """(start, count) of each slot, on pages of its own."""
    planned = []
    for number, (start, count) in enumerate(slots):
        length = start + count
        sequence = Sequence(("f", number, 0), 1, list(range(1, length + 1)), SamplingParams(), 0)
        first = 10 * number + 1
        sequence.pages = list(range(first, first + -(-length // PAGE)))
        planned.append(Slot(sequence, start, count, samples=number % 2 == 0))
    return Batch.from_plan(StepPlan(tuple(planned)), PAGE)


def segments_of(batch: Batch) -> SegmentPlan:
    rows = np.arange(batch.num_rows, dtype=np.int32) % 3 - 1
    return plan_segments(rows, np.array([0, 8], np.int32), np.array([5, 16], np.int32), 16)


def load(inputs: StepInputs, batch: Batch, plan: SegmentPlan | None) -> None:
    inputs.wait()
    inputs.load(batch, plan)
    inputs.planned()


def check(inputs: StepInputs, batch: Batch, plan: SegmentPlan) -> None:
    last_page_lens = [(int(length) - 1) % PAGE + 1 for length in batch.context_lens]
    expected = {
        **{name: getattr(batch, name) for name in SIZES if hasattr(batch, name)},
        "last_page_lens": np.array(last_page_lens, np.int32),
        "segments": plan.packed,
    }
    assert expected.keys() == SIZES.keys()
    for name, values in expected.items():
        on_device = inputs.device(name, len(values))
        assert on_device.dtype == torch.int32
        assert on_device.tolist() == inputs.host(name, len(values)).tolist() == values.tolist(), name
        assert on_device.data_ptr() % 32 == inputs.device("token_ids", 1).data_ptr() % 32, f"{name} is not aligned"
    segments = inputs.segments(plan)
    assert segments.plan is plan
    assert np.array_equal(segments.tiles.cpu(), plan.tiles)
    assert np.array_equal(segments.rows.cpu(), plan.rows)


LARGEST = [(0, 8), (3, 9), (39, 1), (10, 5), (0, 4), (21, 3), (7, 1), (0, 8), (35, 1)]
SMALLER = [(0, 2), (12, 1), (4, 6)]


def test_views_show_what_was_loaded_and_nothing_of_the_step_before(inputs: StepInputs):
    for slots in (SMALLER, LARGEST, SMALLER, [(0, 1)], LARGEST):
        batch = batch_of(*slots)
        plan = segments_of(batch)
        load(inputs, batch, plan)
        check(inputs, batch, plan)


def test_largest_step_fills_the_buffer():
    batch = batch_of(*LARGEST)
    assert (batch.num_rows, len(batch.context_lens)) == (MAX_ROWS, MAX_SLOTS)
    assert len(batch.pages) <= MAX_PAGES


def test_padded_segments_have_their_order_behind_the_last_tile_of_the_graph(inputs: StepInputs):
    batch = batch_of((5, 1), (9, 1), (0, 1)).padded(8)
    plan = segments_of(batch).pad_to(MAX_TILES)
    load(inputs, batch, plan)
    check(inputs, batch, plan)
    assert not inputs.segments(plan).tiles[segments_of(batch).num_tiles :].any()


def test_no_segments_leave_the_rest_right(inputs: StepInputs):
    batch = batch_of(*SMALLER)
    plan = segments_of(batch)
    load(inputs, batch_of(*LARGEST), plan)
    load(inputs, batch, None)
    check(inputs, batch, plan)


@pytest.mark.parametrize("side", ["host", "device"])
def test_no_field_lies_in_another(inputs: StepInputs, side: str):
    views = {name: getattr(inputs, side)(name, size) for name, size in SIZES.items()}
    for value, view in enumerate(views.values(), start=1):
        view.fill_(value)
    for value, (name, view) in enumerate(views.items(), start=1):
        assert (view == value).all(), name


def test_what_does_not_fit_is_refused_and_overwrites_nothing(inputs: StepInputs):
    batch = batch_of(*LARGEST)
    load(inputs, batch, segments_of(batch))
    too_many = segments_of(batch).pad_to(MAX_SEGMENTS // (8 + 16) + 1)
    with pytest.raises(ValueError, match=f"segments: .* words, the buffer has room for {MAX_SEGMENTS}"):
        load(inputs, batch, too_many)
    assert inputs.host("pages", len(batch.pages)).tolist() == batch.pages.tolist()
