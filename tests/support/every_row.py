# SPDX-License-Identifier: Apache-2.0
"""What is in an engine's steps, and the logits of every row, those of prompt chunks included, which nobody wants."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import Tensor

from gpu_driver import Driver
from multilora_backend.core import StepPlan
from multilora_backend.engine.runner import Launched


class EveryRow:
    """Steps with rows that are not sampled are computed for all rows. Steps must not overlap, nor be graphs."""

    def __init__(self, driver: Driver, logits: bool = True) -> None:
        """`logits` false: only who had how many rows in which step."""
        self.rows: dict[int, dict[int, Tensor]] = defaultdict(dict)
        """[vocabulary or more] by number of the request and position."""
        self.steps: list[dict[int, int]] = []
        """Rows of each request, step by step."""
        self._runner = driver.runner
        self._launch, self._forward = self._runner.launch, self._runner.forward
        self._plan = StepPlan(())
        self._runner.launch = self._launched  # type: ignore[method-assign]
        if logits:
            self._runner.forward = self._computed  # type: ignore[method-assign]

    def stop(self) -> None:
        self._runner.launch, self._runner.forward = self._launch, self._forward  # type: ignore[method-assign]

    def _launched(self, plan: StepPlan) -> Launched:
        self._plan = plan
        self.steps.append({slot.sequence.key[1]: slot.count for slot in plan.slots})
        return self._launch(plan)

    def _computed(self, attention: Any, rows: int, samples: int | None, query: Tensor | None = None) -> Tensor:
        extras, inputs = self._runner._lora.extras, self._runner._inputs
        step, segments = extras._step, extras._segments
        if samples == rows:
            logits = every = self._forward(attention, rows, samples, query)
        elif step is None:
            every = self._forward(attention, rows, None, query)
            logits = every[inputs.device("sample_rows", max(samples or 0, 1)).long()]
        else:  # the head's extras depend on which rows are sampled, so the step is computed both ways
            logits = self._forward(attention, rows, samples, query)
            extras.enter(replace(step, sample_slots=step.row_slots), segments)
            every = self._forward(attention, rows, None, query)
            extras.enter(step, segments)
        each = iter(every.clone())
        for slot in self._plan.slots:
            for position in range(slot.start, slot.start + slot.count):
                self.rows[slot.sequence.key[1]][position] = next(each)
        return logits
