# SPDX-License-Identifier: Apache-2.0
"""Runs planned steps on the model: rows in, sampled tokens out, without waiting for the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from multilora_backend.config import Config
from multilora_backend.core import PageMove, Slot, StepPlan
from multilora_backend.engine.graphs import DecodeGraphs
from multilora_backend.engine.host_pages import HostPageStore
from multilora_backend.engine.prompt_graphs import MAX_ADAPTERS, PromptGraphs
from multilora_backend.engine.sampler import Pending, Sampled, Sampler
from multilora_backend.engine.warm_up import warm_up_rows
from multilora_backend.models import context
from multilora_backend.models.attention import AttentionBackend
from multilora_backend.models.batch import Batch
from multilora_backend.models.flashinfer_attention import FlashInferAttention, create_attention
from multilora_backend.models.inputs import StepInputs
from multilora_backend.models.loader import LoadedModel, attention_modules
from multilora_backend.models.lora import Grouped, LoraStep, LoraStrategy, Reference
from multilora_backend.models.moe import capturable
from multilora_kernels import ANY_RANKS, FEW_RANKS, max_packed

log = logging.getLogger(__name__)

ROW_ALIGNMENT = 16
"""Elements: Triton compiles one kernel for strides that are multiples of it, and one for all others."""


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
        host_pages: HostPageStore | None = None,
    ) -> None:
        self.sampler = Sampler(model.config.vocab_size, model.eos_token_ids, model.device)
        self.decode_graphs: DecodeGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None
        self._model = model
        self._attention = attention
        self._lora = lora
        self._inputs = inputs
        self._page_size = page_size
        self._host_pages = host_pages
        self._drawn = torch.zeros(max_slots, dtype=torch.int32, device=model.device)
        self._drawn_rows: dict[tuple[str, int, int], int] = {}

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Queues the plan's rows. A sequence's newest token may be unknown if the launch before this one draws it."""
        batch = Batch.from_plan(plan, self._page_size, self._drawn_rows)
        slots = [plan.slots[i] for i in batch.sample_slots]
        self._inputs.wait()
        graphs = not (self._lora.extras.act_on(batch) or self._lora.acts_on_experts(batch))
        decode = graphs and batch.one_row_each and len(slots) == batch.num_rows
        logits = self._decode(batch) if decode else None
        if logits is None:
            logits = self._prompt(batch, graphs)
        if not slots:
            return Launched(plan, slots, None)
        pending = self.sampler.launch(logits[: len(slots)], [slot.sequence for slot in slots])
        self._drawn[: len(slots)].copy_(pending.token_ids)
        self._drawn_rows = {slot.sequence.key: row for row, slot in enumerate(slots)}
        return Launched(plan, slots, pending)

    def _decode(self, batch: Batch) -> Tensor | None:
        """Replays a decode step; None if no graph holds it."""
        graph = None
        if self.decode_graphs is not None:
            ranks = self._lora.ranks(batch)
            graph = self.decode_graphs.find(batch.num_rows, self._lora.tier(ranks), max(ranks, default=0))
        if graph is None:
            return None
        batch = batch.padded(graph.rows)
        self._enter(batch, graph.fit(self._lora.plan(batch)), graph.attention)
        graph.replay()
        return graph.logits

    def _prompt(self, batch: Batch, graphs: bool) -> Tensor:
        """A step of any shape, in pieces of graph if there is one for it and `graphs` may be used."""
        samples, graph = len(batch.sample_rows), None
        if graphs and self.prompt_graphs is not None:
            graph = self.prompt_graphs.find(batch.num_rows, samples, self._lora.ranks(batch))
        if graph is not None:
            batch = batch.padded(graph.rows, one_row_each=False).sampling(graph.samples)
            self._enter(batch, graph.fit(self._lora.plan(batch, graph.block_m, graph.tier)), self._attention)
            graph.replay(self._attention)
            return graph.logits
        self._enter(batch, self._lora.plan(batch), self._attention)
        return self.forward(self._attention, batch.num_rows, samples)

    def _enter(self, batch: Batch, step: LoraStep, attention: AttentionBackend) -> None:
        """Queues all that the step reads on the device."""
        self._inputs.load(batch, step.segments)
        self._lora.enter(step, None if step.segments is None else self._inputs.segments(step.segments))
        attention.plan(batch)
        self._inputs.planned()

    def move_pages(self, moves: Sequence[PageMove]) -> None:
        """Queues copies of KV pages to the host and back, before the step that is launched next."""
        if self._host_pages is not None:
            self._host_pages.move(moves)

    def forward(
        self,
        attention: AttentionBackend,
        rows: int,
        samples: int | None,
        query: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Logits `[samples, vocab]` of the step in the inputs; of every row in order if `samples` is None.

        They are in `out` if that is given, for a step whose adapters have no extras; otherwise they have more columns
        than the model has tokens if an adapter of the step has more.
        """
        device = self._inputs.device
        sources = device("sources", rows)
        token_ids = torch.where(sources >= 0, self._drawn[sources.clamp_min(0)], device("token_ids", rows))
        keep: Tensor | int = 0
        if samples is not None:
            # A step of prompt chunks alone samples nothing, but transformers wants one row for the head.
            keep = device("sample_rows", max(samples, 1)).long()
        step = context.StepContext(attention, self._lora, device("write_slots", rows), query, out)
        with context.step(step):
            logits: Tensor = self._model.module(
                input_ids=token_ids[None],
                position_ids=device("positions", rows)[None],
                logits_to_keep=keep,
                use_cache=False,
            ).logits[0]
        # Behind the model's own last steps, such as a softcap, which leave no infinity.
        self._lora.extras.bound(logits, self._model.config.vocab_size)
        if out is None or logits.is_set_to(out):
            return logits
        return out.copy_(logits)  # the model's last steps made new tensors

    @torch.inference_mode()
    def warm_up(self, max_rows: int) -> None:
        """Runs every variant of the kernels that an eager step may need, so that no request waits for a compiler."""
        everything = self._lora.extras.everything()
        num_experts = max((site.experts for site in self._model.sites), default=0)
        top_k = int(self._model.config.num_experts_per_tok) if num_experts else 0
        for rows in warm_up_rows(max_rows, top_k, num_experts):
            steps = [LoraStep()]
            if isinstance(self._lora, Grouped):
                steps += self._lora.variants(rows)
                if everything is not None:
                    steps += [replace(step, extras=everything) for step in steps[1:]]
                if num_experts:
                    steps += [replace(step, experts=True) for step in steps[1:]]
            for step in steps:
                logits = self._run_idle(rows, step)
        self.sampler.warm_up(logits)
        if everything is not None:
            # An adapter may know more tokens than the model: rows that begin anywhere take kernels of their own, and
            # those that begin on whole vectors too.
            width = logits.shape[1]
            for wider in (width + 1, (width // ROW_ALIGNMENT + 1) * ROW_ALIGNMENT):
                self.sampler.warm_up(F.pad(logits, (0, wider - width)))

    def _run_idle(self, rows: int, step: LoraStep) -> Tensor:
        """A step of one slot whose pages are all the trash page."""
        self._inputs.wait()
        self._enter(Batch.idle(rows, self._page_size), step, self._attention)
        return self.forward(self._attention, rows, 1)

    @torch.inference_mode()
    def capture(self, max_rows: int, max_slots: int, budget_bytes: int) -> None:
        """Captures decode steps, steps with prompts, and decode steps of few ranks once more, within the budget.

        Does nothing without FlashInfer, for the reference of LoRA, which reads its plan on the host, and for experts
        that torch can only loop over.
        """
        attention = self._attention
        if not isinstance(attention, FlashInferAttention) or isinstance(self._lora, Reference):
            return
        model, inputs, page_size = self._model, self._inputs, self._page_size
        if not capturable(model.module):
            log.warning("no CUDA graphs: torch has no grouped GEMM for experts of %s on this device", model.dtype)
            return
        shape = (max_slots, model.config.vocab_size)
        logits = torch.zeros(shape, dtype=model.dtype, device=model.device)
        decode = DecodeGraphs(self.forward, attention, self._lora, inputs, page_size, logits)
        spent = logits.nbytes + decode.capture(ANY_RANKS, budget_bytes - logits.nbytes)
        layer = attention_modules(model.module)[0]
        prompts = PromptGraphs(self.forward, layer, self._lora, inputs, page_size, logits)
        spent += prompts.capture(max_rows, budget_bytes - spent)
        spent += decode.capture(FEW_RANKS, budget_bytes - spent)
        log.info("CUDA graphs take %.2f GiB of a budget of %.2f GiB", spent / 2**30, budget_bytes / 2**30)
        if spent > budget_bytes:
            log.warning("cuda_graph_bytes is spent: some steps run in larger graphs than they need, or eagerly")
        self.decode_graphs, self.prompt_graphs = decode, prompts


def create_runner(config: Config, model: LoadedModel, lora: LoraStrategy, num_host_pages: int) -> ModelRunner:
    """The runner, warmed up: on CUDA every kernel is compiled and steps are captured when this returns."""
    slots, page_size = config.max_num_seqs, config.block_size
    rows = max(config.max_num_batched_tokens, slots)
    inputs = StepInputs(
        max_rows=rows,
        max_slots=slots + 1,  # padding may be a slot of its own
        max_segments=max_packed(rows, max(slots, MAX_ADAPTERS) + 1),
        max_pages=max(slots * -(-model.max_model_len // page_size), rows // page_size + 1) + rows,
        device=model.device,
    )
    layers = attention_modules(model.module)
    attention = create_attention(layers, page_size, model.dtype, inputs)
    store = HostPageStore([layer.kv_cache for layer in layers], num_host_pages) if num_host_pages else None
    runner = ModelRunner(model, attention, lora, inputs, page_size, slots, store)
    if model.device.type == "cuda":
        started = time.monotonic()
        runner.warm_up(config.max_num_batched_tokens)
        torch.cuda.synchronize()
        log.info("warmed up in %.1f s", time.monotonic() - started)
        if not config.enforce_eager:
            runner.capture(config.max_num_batched_tokens, slots, config.cuda_graph_bytes)
    return runner
