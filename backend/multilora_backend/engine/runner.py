# SPDX-License-Identifier: Apache-2.0
"""Runs one planned step on the model: rows in, sampled tokens out."""

from __future__ import annotations

import torch

from multilora_backend.core import Slot, StepPlan
from multilora_backend.engine.sampler import Sampled, sample
from multilora_backend.models import context
from multilora_backend.models.attention import AttentionBackend
from multilora_backend.models.batch import Batch
from multilora_backend.models.loader import LoadedModel
from multilora_backend.models.lora import LoraStrategy


class ModelRunner:
    """Holds no request state: everything a step needs is in its plan and in the KV pages."""

    def __init__(self, model: LoadedModel, attention: AttentionBackend, lora: LoraStrategy, page_size: int) -> None:
        self._model = model
        self._context = context.StepContext(attention, lora)
        self._page_size = page_size

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[tuple[Slot, Sampled]]:
        """Computes the plan's rows; returns the next token of each slot that samples."""
        batch = Batch.from_plan(plan, self._page_size)
        self._context.attention.plan(batch)
        self._context.lora.plan(batch)
        device = self._model.device
        # A step of prompt chunks alone samples nothing, but transformers wants one row for the head.
        keep = batch.sample_rows if len(batch.sample_rows) else batch.row_starts[:1]
        with context.step(self._context):
            logits = self._model.module(
                input_ids=torch.from_numpy(batch.token_ids).to(device)[None],
                position_ids=torch.from_numpy(batch.positions).to(device)[None],
                logits_to_keep=torch.from_numpy(keep).to(device),
                use_cache=False,
            ).logits[0]
        slots = [plan.slots[i] for i in batch.sample_slots]
        if not slots:
            return []
        tokens = sample(logits, [slot.sequence for slot in slots], self._model.eos_token_ids)
        return list(zip(slots, tokens, strict=True))
