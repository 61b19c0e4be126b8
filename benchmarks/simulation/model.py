# SPDX-License-Identifier: Apache-2.0
"""How long a step and a load take: a few lines through figures that were measured, each kept beside its source.

A step reads the weights or computes, whichever is longer at its number of rows (`rows`: a line through a few points),
reads the KV of sequences that decode, and pays for LoRA: something for there being any, and the bytes of each adapter
in it. What steps cost beyond that (which rows share an adapter, graph sizes, the host, a card that gets warm) is not
modelled.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from multilora_backend.core import StepPlan

PARAMETERS = Path(__file__).with_name("h200-llama-3.1-8b.json")


@dataclass(frozen=True)
class TimeModel:
    """The parameters, under the names of their file."""

    row_1_ms: float
    rows_32_ms: float
    rows_128_ms: float
    rows_256_ms: float
    rows_2048_ms: float
    kv_token_ns: float
    prompt_pair_ns: float
    lora_step_ms: float
    lora_rank_us: float
    lora_prompt_share: float
    device_gb_s: float
    read_gb_s: float
    read_contention: float
    kv_tokens: int

    @classmethod
    def read(cls, path: Path = PARAMETERS) -> TimeModel:
        return cls(**{name: entry["value"] for name, entry in sources(path).items()})

    @cached_property
    def _points(self) -> tuple[tuple[int, float], ...]:
        return (
            (1, self.row_1_ms),
            (32, self.rows_32_ms),
            (128, self.rows_128_ms),
            (256, self.rows_256_ms),
            (2048, self.rows_2048_ms),
        )

    def rows_s(self, rows: int) -> float:
        """A step of so many rows without attention to what came before and without LoRA."""
        points = self._points
        index = min(max(bisect_left(points, (rows,)), 1), len(points) - 1)
        (low, low_ms), (high, high_ms) = points[index - 1], points[index]
        return (low_ms + (high_ms - low_ms) * (rows - low) / (high - low)) / 1e3

    def step_s(self, plan: StepPlan, rank_of: Callable[[str], int]) -> float:
        """Seconds on the device."""
        rows = read = pairs = lora_rows = 0
        adapters: set[str] = set()
        for slot in plan.slots:
            count = slot.count
            rows += count
            if count == 1:
                read += slot.start
            else:
                pairs += count * (slot.start + count // 2)
            adapter = slot.sequence.adapter
            if adapter:
                adapters.add(adapter)
                lora_rows += count
        seconds = self.rows_s(rows)
        if adapters:
            prompts = rows > len(plan.slots)
            share = self.lora_prompt_share * lora_rows / rows if prompts else 0.0
            seconds += seconds * share + self.lora_step_ms / 1e3
            seconds += sum(map(rank_of, adapters)) * self.lora_rank_us / 1e6
        return seconds + read * self.kv_token_ns / 1e9 + pairs * self.prompt_pair_ns / 1e9

    def read_s(self, nbytes: int, readers: int) -> float:
        """From the disk to the host cache, when so many threads read, this one included."""
        return nbytes / self.read_gb_s / 1e9 * (1 + self.read_contention * (readers - 1))

    def copy_s(self, nbytes: int) -> float:
        """From the host cache to the device pool."""
        return nbytes / self.device_gb_s / 1e9


def sources(path: Path = PARAMETERS) -> dict[str, dict[str, Any]]:
    """Name -> value and source."""
    return json.loads(path.read_text())["parameters"]
