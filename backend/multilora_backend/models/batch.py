# SPDX-License-Identifier: Apache-2.0
"""The ragged batch of one step as flat host arrays: what attention, LoRA and the sampler plan from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from multilora_backend.core import UNKNOWN_TOKEN, Slot, StepPlan
from multilora_backend.scheduling.pages import TRASH_PAGE

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """T rows, one a token, slot after slot; S slots. All arrays int32."""

    token_ids: Ints
    """[T]; 0 where `sources` has the token."""
    sources: Ints
    """[T]: row of the previous step's samples that is this row's token, -1 if it is in `token_ids`."""
    positions: Ints
    """[T]"""
    write_slots: Ints
    """[T]: where K and V of the row go, page * page_size + offset."""
    adapter_slots: Ints
    """[T]: index of the resident adapter, -1 for the base model."""
    row_starts: Ints
    """[S + 1]: slot i owns rows row_starts[i] to row_starts[i + 1]."""
    context_lens: Ints
    """[S]: tokens of the sequence up to and with the slot's last row."""
    page_starts: Ints
    """[S + 1]: slot i's pages are pages[page_starts[i] : page_starts[i + 1]]."""
    pages: Ints
    """Pages that hold positions 0 to context_lens[i] - 1, slot after slot."""
    sample_rows: Ints
    """[B]: rows whose logits are wanted, and"""
    sample_slots: list[int]
    """[B]: the slots that they belong to."""
    page_size: int

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def one_row_each(self) -> bool:
        """Every slot is one row: a decode step, padded or not."""
        return len(self.context_lens) == len(self.token_ids)

    @classmethod
    def from_plan(
        cls, plan: StepPlan, page_size: int, previous: Mapping[tuple[str, int, int], int] | None = None
    ) -> Batch:
        """`previous` maps the keys of sequences whose newest token is not known on the host to its sample row."""
        slots = plan.slots
        starts = np.array([slot.start for slot in slots], dtype=np.int32)
        counts = np.array([slot.count for slot in slots], dtype=np.int32)
        row_starts = _starts(counts)
        offsets: Ints = starts - row_starts[:-1]
        positions: Ints = np.repeat(offsets, counts) + np.arange(row_starts[-1], dtype=np.int32)
        lens = starts + counts
        num_pages = -(-lens // page_size)
        page_starts = _starts(num_pages)
        lists = [slot.sequence.pages for slot in slots]
        held = zip(lists, num_pages.tolist(), strict=True)
        pages = np.fromiter(chain.from_iterable(p if len(p) == n else p[:n] for p, n in held), np.int32)
        first_page = np.repeat(page_starts[:-1], counts)
        leases = [slot.sequence.lease for slot in slots]
        adapters = np.array([-1 if lease is None else lease.slot for lease in leases], dtype=np.int32)
        adapter_slots: Ints = np.repeat(adapters, counts)
        for i, slot in enumerate(slots):
            if slot.sequence.adapter_start > slot.start:
                first = int(row_starts[i])
                adapter_slots[first : first + min(slot.sequence.adapter_start - slot.start, slot.count)] = -1
        sample_slots = [i for i, slot in enumerate(slots) if slot.samples]
        token_ids = np.fromiter(chain.from_iterable(_tokens(slot) for slot in slots), np.int32)
        sources = np.full(len(token_ids), -1, dtype=np.int32)
        unknown = np.flatnonzero(token_ids == UNKNOWN_TOKEN)
        for row in unknown.tolist():
            slot = slots[int(np.searchsorted(row_starts, row, side="right")) - 1]
            sources[row] = (previous or {})[slot.sequence.key]
        token_ids[unknown] = 0
        return cls(
            token_ids=token_ids,
            sources=sources,
            positions=positions,
            write_slots=pages[first_page + positions // page_size] * page_size + positions % page_size,
            adapter_slots=adapter_slots,
            row_starts=row_starts,
            context_lens=lens,
            page_starts=page_starts,
            pages=pages,
            sample_rows=row_starts[1:][sample_slots] - 1,
            sample_slots=sample_slots,
            page_size=page_size,
        )

    @classmethod
    def idle(cls, rows: int, page_size: int) -> Batch:
        """One slot of that many rows in the trash page, for warm-up and capture."""
        positions = np.arange(rows, dtype=np.int32)
        pages = -(-rows // page_size)
        return cls(
            token_ids=np.zeros(rows, dtype=np.int32),
            sources=np.full(rows, -1, dtype=np.int32),
            positions=positions,
            write_slots=TRASH_PAGE * page_size + positions % page_size,
            adapter_slots=np.full(rows, -1, dtype=np.int32),
            row_starts=np.array([0, rows], dtype=np.int32),
            context_lens=np.array([rows], dtype=np.int32),
            page_starts=np.array([0, pages], dtype=np.int32),
            pages=np.full(pages, TRASH_PAGE, dtype=np.int32),
            sample_rows=np.array([rows - 1], dtype=np.int32),
            sample_slots=[0],
            page_size=page_size,
        )

    def padded(self, rows: int, one_row_each: bool = True) -> Batch:
        """With rows up to `rows` that nobody samples: token 0 in the trash page, in slots of one row each or in one."""
        more = rows - self.num_rows
        if not more:
            return self
        counts = np.ones(more, dtype=np.int32) if one_row_each else np.array([more], dtype=np.int32)
        starts, page_starts = _starts(counts), _starts(-(-counts // self.page_size))
        positions: Ints = np.arange(more, dtype=np.int32) - np.repeat(starts[:-1], counts)
        zeros = np.zeros(more, dtype=np.int32)
        return replace(
            self,
            token_ids=np.concatenate([self.token_ids, zeros]),
            sources=np.concatenate([self.sources, zeros - 1]),
            positions=np.concatenate([self.positions, positions]),
            write_slots=np.concatenate([self.write_slots, zeros + TRASH_PAGE * self.page_size]),
            adapter_slots=np.concatenate([self.adapter_slots, zeros - 1]),
            row_starts=np.concatenate([self.row_starts, self.row_starts[-1] + starts[1:]]),
            context_lens=np.concatenate([self.context_lens, counts]),
            page_starts=np.concatenate([self.page_starts, self.page_starts[-1] + page_starts[1:]]),
            pages=np.concatenate([self.pages, np.full(page_starts[-1], TRASH_PAGE, dtype=np.int32)]),
        )

    def sampling(self, count: int) -> Batch:
        """With row 0 sampled for nobody as often as it takes to make `count` sample rows."""
        sample_rows = np.zeros(count, dtype=np.int32)
        sample_rows[: len(self.sample_rows)] = self.sample_rows
        return replace(self, sample_rows=sample_rows)


def _starts(counts: Ints) -> Ints:
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _tokens(slot: Slot) -> list[int]:
    token_ids = slot.sequence.token_ids
    if slot.count == 1:
        return [token_ids[slot.start]]
    return token_ids[slot.start : slot.start + slot.count]
