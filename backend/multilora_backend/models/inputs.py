# SPDX-License-Identifier: Apache-2.0
"""All that a step reads on the device, in one static buffer: one copy brings it there, graphs keep its addresses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from multilora_backend.models.batch import Batch
from multilora_kernels import SegmentPlan, Segments

_ALIGN = 8
"""int32 words: every field starts on 32 bytes, as tiles want it."""


class StepInputs:
    """A host buffer (pinned on CUDA), its twin on the device, and named int32 views of both."""

    def __init__(self, max_rows: int, max_slots: int, max_segments: int, max_pages: int, device: torch.device) -> None:
        """`max_segments` bounds the int32 words of a packed plan, and `max_pages` the pages of a step added up over its
        slots, shared ones counted each time.
        """
        sizes = {
            "token_ids": max_rows,
            "sources": max_rows,
            "positions": max_rows,
            "write_slots": max_rows,
            "sample_rows": max_slots,
            "row_starts": max_slots + 1,
            "page_starts": max_slots + 1,
            "last_page_lens": max_slots,
            "segments": max_segments,
            "pages": max_pages,  # last: only what is used of it is copied
        }
        self._sizes = sizes
        self._offsets: dict[str, int] = {}
        total = 0
        for name, size in sizes.items():
            self._offsets[name] = total
            total += -(-size // _ALIGN) * _ALIGN
        cuda = device.type == "cuda"
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=cuda)
        self._array = self._host.numpy()
        self._device = torch.zeros(total, dtype=torch.int32, device=device) if cuda else self._host
        self._copied = torch.cuda.Event() if cuda else None
        self.max_pages = max_pages

    def wait(self) -> None:
        """Returns when the host buffers that the last step was planned in may be written again.

        With one step under way this never waits: that step's copies end when the step before it does.
        """
        if self._copied is not None:
            self._copied.synchronize()

    def planned(self) -> None:
        """All copies of this step from pinned host memory are queued: the next `wait` is for them."""
        if self._copied is not None:
            self._copied.record()

    def load(self, batch: Batch, segments: SegmentPlan | None) -> None:
        """Queues the copy of a step's metadata.

        Raises:
            ValueError: something is longer than what the buffer was made for.
        """
        self._put("token_ids", batch.token_ids)
        self._put("sources", batch.sources)
        self._put("positions", batch.positions)
        self._put("write_slots", batch.write_slots)
        self._put("sample_rows", batch.sample_rows)
        self._put("row_starts", batch.row_starts)
        self._put("page_starts", batch.page_starts)
        self._put("last_page_lens", (batch.context_lens - 1) % batch.page_size + 1)
        if segments is not None:
            self._put("segments", segments.packed)
        self._put("pages", batch.pages)
        used = self._offsets["pages"] + len(batch.pages)
        if self._copied is not None:
            self._device[:used].copy_(self._host[:used], non_blocking=True)

    def device(self, name: str, size: int) -> Tensor:
        """int32 [size] on the device."""
        return self._device.narrow(0, self._offsets[name], size)

    def host(self, name: str, size: int) -> Tensor:
        """int32 [size] on the host, in pinned memory on CUDA."""
        return self._host.narrow(0, self._offsets[name], size)

    def segments(self, plan: SegmentPlan) -> Segments:
        return plan.views(self.device("segments", len(plan.packed)))

    def _put(self, name: str, values: np.ndarray) -> None:
        # What is longer would overwrite the next field, and kernels would take that for tiles.
        if len(values) > self._sizes[name]:
            raise ValueError(f"{name}: {len(values)} words, the buffer has room for {self._sizes[name]}")
        start = self._offsets[name]
        self._array[start : start + len(values)] = values
