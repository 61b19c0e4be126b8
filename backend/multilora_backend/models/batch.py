# SPDX-License-Identifier: Apache-2.0
"""The ragged batch of one step as flat host arrays: what attention, LoRA and the sampler plan from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from multilora_backend.core import StepPlan


@dataclass(frozen=True)
class Batch:
    """T rows, one a token, slot after slot; S slots."""

    token_ids: np.ndarray
    """int64 [T]"""
    positions: np.ndarray
    """int64 [T]"""
    write_pages: np.ndarray
    """int64 [T]: the KV page of each row, and"""
    write_offsets: np.ndarray
    """int64 [T]: its place in the page."""
    adapter_slots: np.ndarray
    """int32 [T]: index of the resident adapter, -1 for the base model."""
    row_starts: np.ndarray
    """int64 [S + 1]: slot i owns rows row_starts[i] to row_starts[i + 1]."""
    context_lens: np.ndarray
    """int64 [S]: tokens of the sequence up to and with the slot's last row."""
    pages: list[list[int]]
    """[S]: pages that hold positions 0 to context_lens[i] - 1."""
    sample_rows: np.ndarray
    """int64 [B]: rows whose logits are wanted, and"""
    sample_slots: list[int]
    """[B]: the slots that they belong to."""

    @classmethod
    def from_plan(cls, plan: StepPlan, page_size: int) -> Batch:
        counts = np.array([slot.count for slot in plan.slots], dtype=np.int64)
        row_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        token_ids, positions, write_pages, adapters = [], [], [], []
        for slot in plan.slots:
            sequence = slot.sequence
            span = np.arange(slot.start, slot.start + slot.count)
            token_ids.append(np.array(sequence.token_ids[slot.start : slot.start + slot.count]))
            positions.append(span)
            write_pages.append(np.array(sequence.pages)[span // page_size])
            adapters.append(np.full(slot.count, -1 if sequence.lease is None else sequence.lease.slot))
        flat_positions = np.concatenate(positions).astype(np.int64)
        ends = [slot.start + slot.count for slot in plan.slots]
        sample_slots = [i for i, slot in enumerate(plan.slots) if slot.samples]
        return cls(
            token_ids=np.concatenate(token_ids).astype(np.int64),
            positions=flat_positions,
            write_pages=np.concatenate(write_pages).astype(np.int64),
            write_offsets=flat_positions % page_size,
            adapter_slots=np.concatenate(adapters).astype(np.int32),
            row_starts=row_starts,
            context_lens=np.array(ends, dtype=np.int64),
            pages=[s.sequence.pages[: -(-end // page_size)] for s, end in zip(plan.slots, ends, strict=True)],
            sample_rows=row_starts[1:][sample_slots] - 1,
            sample_slots=sample_slots,
        )
