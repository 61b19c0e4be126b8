# SPDX-License-Identifier: Apache-2.0
"""Steps of a loaded model without an engine around it: slots with pages and adapters in, logits of every row out."""

from __future__ import annotations

import torch

from multilora_backend.adapters.state import Lease
from multilora_backend.core import SamplingParams, Sequence, Slot, StepPlan
from multilora_backend.models import context
from multilora_backend.models.attention import TorchAttention
from multilora_backend.models.batch import Batch
from multilora_backend.models.loader import LoadedModel
from multilora_backend.models.lora import LoraStrategy, NoLora

PAGE = 4


def sequence(number: int, tokens: list[int], pages: list[int], adapter: int = -1) -> Sequence:
    """`adapter`: the slot of its adapter in the device pool, -1 for none."""
    s = Sequence(("t", number, 0), len(tokens), tokens, SamplingParams(), 0)
    s.pages = pages
    if adapter >= 0:
        s.lease = Lease("", "", adapter, 0, 8, 1)
    return s


def logits_of_step(model: LoadedModel, slots: list[Slot], lora: LoraStrategy | None = None) -> torch.Tensor:
    """Logits `[T, vocab]` of all rows of a step."""
    batch = Batch.from_plan(StepPlan(tuple(slots)), PAGE)
    attention = TorchAttention(PAGE, model.device)
    attention.plan(batch)
    lora = lora or NoLora()
    plan = lora.plan(batch)
    lora.enter(plan, None if plan.segments is None else plan.segments.to(model.device))
    step = context.StepContext(attention, lora, torch.from_numpy(batch.write_slots))
    with torch.inference_mode(), context.step(step):
        return model.module(
            input_ids=torch.from_numpy(batch.token_ids)[None],
            position_ids=torch.from_numpy(batch.positions)[None],
            use_cache=False,
        ).logits[0]
