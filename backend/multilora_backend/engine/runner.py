# SPDX-License-Identifier: Apache-2.0
"""Runs planned steps on the model: rows in, sampled tokens out, without waiting for the device."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora_backend.config import Config
from multilora_backend.core import Slot, StepPlan
from multilora_backend.engine.graphs import DecodeGraphs
from multilora_backend.engine.sampler import Pending, Sampled, Sampler
from multilora_backend.models import context
from multilora_backend.models.attention import AttentionBackend
from multilora_backend.models.batch import Batch
from multilora_backend.models.flashinfer_attention import FlashInferAttention, create_attention
from multilora_backend.models.inputs import StepInputs
from multilora_backend.models.loader import LoadedModel, attention_modules
from multilora_backend.models.lora import Grouped, LoraStep, LoraStrategy
from multilora_kernels import max_tiles

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launched:
    """A step that the device has been given."""

    plan: StepPlan
    slots: list[Slot]
    """Those that sample."""
    pending: Pending | None

    def result(self) -> list[tuple[Slot, Sampled]]:
        """Waits for the step; returns the next token of each slot that samples."""
        if self.pending is None:
            return []
        return list(zip(self.slots, self.pending.result(), strict=True))


class ModelRunner:
    """Holds no request state but the last step's tokens, which the next step may read on the device."""

    def __init__(
        self,
        model: LoadedModel,
        attention: AttentionBackend,
        lora: LoraStrategy,
        inputs: StepInputs,
        page_size: int,
        max_slots: int,
    ) -> None:
        self.sampler = Sampler(model.config.vocab_size, model.eos_token_ids, model.device)
        self.graphs: DecodeGraphs | None = None
        self._model = model
        self._attention = attention
        self._lora = lora
        self._inputs = inputs
        self._page_size = page_size
        self._drawn = torch.zeros(max_slots, dtype=torch.int32, device=model.device)
        self._drawn_rows: dict[tuple[str, int, int], int] = {}

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Queues the plan's rows. A sequence's newest token may be unknown if the launch before this one draws it."""
        batch = Batch.from_plan(plan, self._page_size, self._drawn_rows)
        slots = [plan.slots[i] for i in batch.sample_slots]
        self._inputs.wait()
        graph = None
        if self.graphs is not None and batch.one_row_each and len(slots) == batch.num_rows:
            graph = self.graphs.find(batch.num_rows, self._lora.tier(batch))
        if graph is not None:
            batch = batch.padded(graph.rows)
        step = self._lora.plan(batch)
        if graph is not None and step.segments is not None:
            step = graph.fit(step)
        self._inputs.load(batch, self._page_size, step.segments)
        self._lora.enter(step, None if step.segments is None else self._inputs.segments(step.segments))
        attention = self._attention if graph is None else graph.attention
        attention.plan(batch)
        self._inputs.planned()
        if graph is not None:
            graph.replay()
            logits = graph.logits[: len(slots)]
        else:
            logits = self.forward(attention, batch.num_rows, len(slots))
        if not slots:
            return Launched(plan, slots, None)
        pending = self.sampler.launch(logits, [slot.sequence for slot in slots])
        self._drawn[: len(slots)].copy_(pending.token_ids)
        self._drawn_rows = {slot.sequence.key: row for row, slot in enumerate(slots)}
        return Launched(plan, slots, pending)

    def forward(self, attention: AttentionBackend, rows: int, samples: int | None) -> Tensor:
        """Logits `[samples, vocab]` of the step in the inputs; of every row in order if `samples` is None."""
        device = self._inputs.device
        sources = device("sources", rows)
        token_ids = torch.where(sources >= 0, self._drawn[sources.clamp_min(0)], device("token_ids", rows))
        keep: Tensor | int = 0
        if samples is not None:
            # A step of prompt chunks alone samples nothing, but transformers wants one row for the head.
            keep = device("sample_rows", max(samples, 1)).long()
        step = context.StepContext(attention, self._lora, device("write_slots", rows))
        with context.step(step):
            return self._model.module(
                input_ids=token_ids[None],
                position_ids=device("positions", rows)[None],
                logits_to_keep=keep,
                use_cache=False,
            ).logits[0]

    @torch.inference_mode()
    def warm_up(self, max_rows: int) -> None:
        """Runs every variant of the kernels that an eager step may need, so that no request waits for a compiler."""
        for rows in sorted({min(n, max_rows) for n in (1, 17, 1040, 4112, max_rows)}):
            steps = [LoraStep()]
            if isinstance(self._lora, Grouped):
                steps += self._lora.variants(rows)
            for step in steps:
                logits = self._run_idle(rows, step)
        self.sampler.warm_up(logits)

    def _run_idle(self, rows: int, step: LoraStep) -> Tensor:
        """A step of one slot whose pages are all the trash page."""
        batch = Batch.idle(rows, self._page_size)
        self._inputs.wait()
        self._inputs.load(batch, self._page_size, step.segments)
        self._lora.enter(step, None if step.segments is None else self._inputs.segments(step.segments))
        self._attention.plan(batch)
        self._inputs.planned()
        return self.forward(self._attention, rows, 1)


def create_runner(config: Config, model: LoadedModel, lora: LoraStrategy) -> ModelRunner:
    """The runner, warmed up: on CUDA every kernel is compiled and decode steps are captured when this returns."""
    rows = max(config.max_num_batched_tokens, config.max_num_seqs)
    inputs = StepInputs(
        max_rows=rows,
        max_slots=config.max_num_seqs,
        max_tiles=max_tiles(rows, config.max_num_seqs + 1, 16),
        max_pages=max(
            config.max_num_seqs * -(-model.max_model_len // config.block_size), rows // config.block_size + 1
        ),
        device=model.device,
    )
    attention = create_attention(attention_modules(model.module), config.block_size, model.dtype, inputs)
    runner = ModelRunner(model, attention, lora, inputs, config.block_size, config.max_num_seqs)
    if model.device.type != "cuda":
        return runner
    started = time.monotonic()
    runner.warm_up(config.max_num_batched_tokens)
    torch.cuda.synchronize()
    log.info("warmed up in %.1f s", time.monotonic() - started)
    if not config.enforce_eager and isinstance(attention, FlashInferAttention):
        graphs = DecodeGraphs(runner.forward, attention, lora, inputs, config.block_size)
        graphs.capture(config.max_num_seqs, config.cuda_graph_bytes)
        runner.graphs = graphs
    return runner
