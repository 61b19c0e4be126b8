# SPDX-License-Identifier: Apache-2.0
"""An engine driven step by step on the models of `gpu_models`; without CUDA, graphs are stand-ins that run eagerly."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_models import Request
from multilora_backend.adapters.ranks import PAGE
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams, Sequence
from multilora_backend.engine.engine import Engine
from multilora_backend.engine.graphs import DecodeGraph, DecodeGraphs, to_capture
from multilora_backend.engine.prompt_graphs import MAX_ADAPTERS, PromptGraph, PromptGraphs
from multilora_backend.engine.prompt_graphs import sizes_up_to as prompt_sizes_up_to
from multilora_backend.engine.runner import ModelRunner
from multilora_backend.models.bordered import Bordered
from multilora_backend.models.loader import attention_modules
from multilora_backend.models.lora import Grouped, LoraStep
from multilora_backend.protocol import Failed, Outputs, Submit
from multilora_kernels import ANY_RANKS, FEW_RANKS, max_tiles, rank_block_for


@dataclass(frozen=True)
class Mode:
    """How an engine computes LoRA, and whether its decode steps are graphs."""

    strategy: str
    graphs: bool

    def __str__(self) -> str:
        return f"{self.strategy}-{'graphs' if self.graphs else 'eager'}"


BORDERED_GRAPHS = Mode("bordered", True)
"""What CUDA gets by default."""


class Driver:
    """An engine, stepped by hand, and what its requests were answered."""

    def __init__(
        self, folder: Path, device: str, mode: Mode = BORDERED_GRAPHS, overlap: bool = True, **settings: Any
    ) -> None:
        """`folder` holds `model` and `adapters`. Skips the test if its mode needs what is not installed."""
        if mode.graphs and device == "cuda":
            pytest.importorskip("flashinfer", reason="graphs need FlashInfer")
        defaults = {
            "model": str(folder / "model"),
            "adapters": str(folder / "adapters"),
            "device": device,
            "dtype": "bfloat16",
            "lora_strategy": mode.strategy,
            "enforce_eager": not mode.graphs,
            "async_scheduling": "true" if overlap else "false",
            "max_num_seqs": 16,
            "max_num_batched_tokens": 64,
            "kv_cache_bytes": 4 * 2**20,
            "adapter_device_bytes": 2**21,
            # Who shares a batch must not depend on what ran before.
            "enable_prefix_caching": False,
        }
        self.engine = Engine(Config(**{**defaults, **settings}), wake=lambda: None)
        assert self.engine._overlap == overlap
        self.runner = self.engine.runner
        self.requests: dict[int, Request] = {}
        self.failed: dict[int, Failed] = {}
        self.record_every = 1
        """Logits are kept of each request whose number is a multiple of this."""
        self._submitted = 0
        self.batches: list[list[tuple[int, int]]] | None = []
        """(request, number of the output token) of each row that was sampled, step by step. None: not kept."""
        self.replayed: list[tuple[int, int, int]] = []
        """(rows, rows of the graph, tier) of each decode step that ran in a graph."""
        self.prompts_replayed: list[tuple[int, int, int]] = []
        """(rows, rows of the graph, samples) of each step that ran in pieces of graph."""
        self._launch_sampler = self.runner.sampler.launch
        self.runner.sampler.launch = self._record  # type: ignore[method-assign]
        if mode.graphs:
            if device == "cpu":
                config = self.engine.config
                stand_in_for_graphs(self.runner, config.max_num_batched_tokens, config.max_num_seqs)
            decode, prompts = self.runner.decode_graphs, self.runner.prompt_graphs
            assert decode is not None
            assert prompts is not None
            self._find, self._find_prompt = decode.find, prompts.find
            decode.find = self._found  # type: ignore[method-assign]
            prompts.find = self._found_prompt  # type: ignore[method-assign]
        _drivers.add(self)

    def submit(self, prompt: list[int], adapter: str = "", **sampling: Any) -> int:
        """Returns the request's number."""
        defaults = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
        params = SamplingParams(**{**defaults, **sampling})
        number, self._submitted = self._submitted, self._submitted + 1
        self.requests[number] = Request(prompt, adapter, params)
        self.engine.submit("front", Submit(number, prompt, params, adapter))
        return number

    def step(self) -> bool:
        busy = self.engine.step()
        for message in self.engine.take_replies().get("front", []):
            if isinstance(message, Failed):
                self.failed[message.request_id] = message
            elif isinstance(message, Outputs):
                for item in message.items:
                    request = self.requests[item.request_id]
                    if item.index == 0:
                        request.token_ids += item.token_ids
                    if item.finish_reason is not None:
                        request.reasons[item.index] = item.finish_reason
        return busy

    def run(self) -> Driver:
        """Until nothing is left to do. Nothing may fail."""
        self.settle()
        assert not self.failed, next(iter(self.failed.values()))
        return self

    def settle(self) -> None:
        """Until nothing is left to do."""
        deadline = time.monotonic() + 60
        while True:
            busy = self.step()
            if self.engine.idle:
                break
            assert time.monotonic() < deadline, "the engine does not get done"
            if not busy:
                time.sleep(0.001)  # a load is under way
        self.engine.check_idle()

    def preload(self, names: Iterable[str]) -> Driver:
        """Loads adapters, so that what follows is batched alike however long a load takes."""
        for name in names:
            if name:
                self.submit([3], name, max_tokens=1)
        self.run()
        return self.clear()

    def clear(self) -> Driver:
        """Forgets what was recorded; request numbers begin at 0 again."""
        self.requests.clear()
        self._submitted = 0
        self.batches = []
        self.replayed.clear()
        self.prompts_replayed.clear()
        return self

    def _record(self, logits: Tensor, sequences: list[Sequence]) -> Any:
        if self.batches is not None:
            self.batches.append([(s.key[1], s.num_output_tokens) for s in sequences])
        copies = logits.to(torch.float32, copy=True)
        for row, sequence in zip(copies, sequences, strict=True):
            _, number, index = sequence.key
            if number in self.requests and index == 0 and number % self.record_every == 0:
                self.requests[number].rows[sequence.num_output_tokens] = row
        return self._launch_sampler(logits, sequences)

    def _found(self, rows: int, tier: int | None, max_rank: int) -> DecodeGraph | None:
        graph = self._find(rows, tier, max_rank)
        if graph is not None:
            self.replayed.append((rows, graph.rows, graph.tier))
        return graph

    def _found_prompt(self, rows: int, samples: int, ranks: list[int]) -> PromptGraph | None:
        graph = self._find_prompt(rows, samples, ranks)
        if graph is not None:
            self.prompts_replayed.append((rows, graph.rows, samples))
        return graph


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def free_drivers() -> None:
    """Ends all engines and gives their memory back. Call it when a test has ended."""
    for driver in list(_drivers):
        driver.engine.close()
    _drivers.clear()
    gc.collect()
    torch.cuda.empty_cache()


class StandIn:
    """Takes the place of a captured graph: a forward pass over the inputs as they are when it is replayed."""

    def __init__(self, runner: ModelRunner, graph: DecodeGraph | PromptGraph) -> None:
        self._runner, self._graph = runner, graph

    def replay(self) -> None:
        graph, lora = self._graph, self._runner._lora
        if isinstance(lora, Grouped):
            segments = lora._segments
            assert (0 if segments is None else segments.plan.num_tiles) == graph.tiles
            assert segments is None or int((segments.rows >= 0).sum()) == graph.rows
        graph.logits.fill_(torch.nan)
        run_eagerly(self._runner, graph, graph.logits)


def run_eagerly(runner: ModelRunner, graph: DecodeGraph | PromptGraph, out: Tensor | None = None) -> Tensor:
    """The logits of a graph's rows or samples, by the kernels that it launches at replay."""
    lora = runner._lora
    if isinstance(lora, Grouped) and lora._segments is not None:  # what is fixed in a capture
        lora._tier = graph.tier
        rank_block = graph.rank_block if isinstance(graph, DecodeGraph) else rank_block_for(graph.ranks)
        plan = replace(lora._segments.plan, rank_block=rank_block)
        lora._segments = replace(lora._segments, plan=plan)
    if isinstance(graph, PromptGraph):
        return runner.forward(runner._attention, graph.rows, graph.samples, out=out)
    return runner.forward(graph.attention, graph.rows, None, out=out)


def stand_in_for_graphs(runner: ModelRunner, max_rows: int, max_slots: int) -> None:
    """Gives a runner on the CPU the graphs that it would have captured on CUDA."""
    lora: Any = runner._lora
    attention: Any = runner._attention
    inputs, page_size = runner._inputs, runner._page_size
    logits = torch.empty(max_slots, runner._model.config.vocab_size, dtype=runner._model.dtype)
    decode = DecodeGraphs(runner.forward, attention, lora, inputs, page_size, logits)
    tiers = lora.tiers if isinstance(lora, Bordered) else ()
    graphs = [(*graph, ranks) for ranks in (ANY_RANKS, FEW_RANKS) for graph in to_capture(ranks, max_slots, tiers)]
    for rows, tier, rank_block in sorted(graphs):
        segments = lora.base_step(rows, tier, rank_block).segments if tier else None
        tiles = 0 if segments is None else segments.num_tiles
        later: Any = None  # the graph and its stand-in know each other
        graph = DecodeGraph(rows, tier, rank_block, tiles, attention, logits[:rows], later)
        object.__setattr__(graph, "graph", StandIn(runner, graph))
        decode._graphs.setdefault((tier, rank_block), {})[rows] = graph
    layer = attention_modules(runner._model.module)[0]
    prompts = PromptGraphs(runner.forward, layer, lora, inputs, page_size, logits)
    for rows in prompt_sizes_up_to(max_rows):
        for step in (LoraStep(), *lora.variants(rows)):
            ranks = tiles = block_m = 0
            if step.segments is not None:
                ranks, block_m = step.segments.max_rank, step.segments.block_m
                tiles = max_tiles(rows, 1 + (step.tier // PAGE or MAX_ADAPTERS), block_m)
            samples = min(max_slots, rows)
            prompt = PromptGraph(rows, samples, ranks, step.tier, tiles, block_m, logits[:samples])
            pieces: Any = [StandIn(runner, prompt)]
            prompt.pieces = pieces
            prompts._graphs.setdefault((step.tier, ranks), []).append(prompt)
    runner.decode_graphs, runner.prompt_graphs = decode, prompts
