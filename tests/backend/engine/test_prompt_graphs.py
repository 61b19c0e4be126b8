# SPDX-License-Identifier: Apache-2.0
"""Captured steps without a GPU: stand-ins that compute, at replay, what a graph of that size would, padding and all."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import tiny_models
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.engine.engine import Engine
from multilora_backend.engine.prompt_graphs import MAX_ADAPTERS, PromptGraph, PromptGraphs, sizes_up_to
from multilora_backend.models.bordered import PROMPT_TIER, Bordered
from multilora_backend.models.lora import NoLora
from multilora_backend.protocol import Outputs, Submit
from multilora_kernels import ANY_RANKS, FEW_RANKS, block_m_for, max_packed, max_tiles, rank_block_for
from multilora_kernels.segments import TILE_FIELDS

LORAS = {"a": {"r": 3}, "b": {"r": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}, "c": {"r": 24}}


class EagerPromptGraph(PromptGraph):
    """Runs the forward pass on as many rows, samples and tiles as the graph would; counts its replays."""

    runner = None
    replays = 0

    def replay(self, attention) -> None:
        layer = self.runner._model.module.model.layers[0].self_attn
        query = torch.full((self.rows, layer.num_heads, layer.head_dim), torch.nan)
        lora = self.runner._lora
        if lora._segments is not None:  # a captured kernel has these two of the graph and not of the step
            assert (lora._segments.plan.num_tiles, lora._h_ranks) == (self.tiles, self.tier)
        self.runner.forward(attention, self.rows, self.samples, query, self.logits)
        EagerPromptGraph.replays += 1


def with_graphs(engine: Engine, rows: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    logits = torch.zeros(8, engine.card.vocab_size)
    graphs = PromptGraphs.__new__(PromptGraphs)
    graphs._graphs = {}
    graphs._lora = engine.runner._lora
    kinds = [(0, most) for most in ranks]
    if isinstance(graphs._lora, Bordered) and max(ranks):
        kinds.append((PROMPT_TIER, PROMPT_TIER))
    for tier, most in kinds:
        for size in rows:
            block_m = block_m_for(size, 1, rank_block_for(most)) if most else 0
            tiles = max_tiles(size, MAX_ADAPTERS + 1, block_m) if most else 0
            graph = EagerPromptGraph(size, min(size, 8), most, tier, tiles, block_m, logits[: min(size, 8)])
            graph.runner = engine.runner
            graphs._graphs.setdefault((tier, most), []).append(graph)
    engine.runner.prompt_graphs = graphs
    EagerPromptGraph.replays = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_models.save_llama(root / "model")
    for seed, (name, lora) in enumerate(LORAS.items()):
        tiny_models.save_adapter(root / "model", root / "adapters" / name, seed, **lora)
    return root


@pytest.mark.parametrize(
    ("rows", "ranks", "replayed"),
    [((5, 12, 20), (0, 16, 64), True), ((20,), (0, 64), True), ((20,), (0,), True), ((), (0,), False)],
    ids=["fitting", "padded", "base only", "none"],
)
@pytest.mark.parametrize("strategy", ["grouped", "bordered"])
def test_padded_steps_say_what_transformers_and_peft_say(
    folder: Path, strategy: str, rows: tuple[int, ...], ranks: tuple[int, ...], replayed: bool
):
    settings = {"model": str(folder / "model"), "adapters": str(folder / "adapters"), "device": "cpu"}
    settings |= {"block_size": 4, "lora_strategy": strategy, "async_scheduling": "true", **tiny_models.ROOM}
    engine = Engine(Config(**settings, max_num_batched_tokens=20, max_num_seqs=8), wake=lambda: None)
    with_graphs(engine, rows, ranks)
    prompts = {"": [5, 6, 7], "a": [9, 8, 7, 6, 5, 4, 3], "b": [5, 6, 7], "c": list(range(3, 29))}
    greedy = SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)
    names = [*prompts] * 3
    for i, name in enumerate(names):
        engine.submit("front", Submit(i, prompts[name], greedy, name))
    tokens: dict[int, list[int]] = {}
    while not engine.idle:
        engine.step()
        for message in engine.take_replies().get("front", []):
            assert isinstance(message, Outputs), message
            for item in message.items:
                tokens.setdefault(item.request_id, []).extend(item.token_ids)
    for i, name in enumerate(names[:4]):
        adapter = folder / "adapters" / name if name else None
        expected = tiny_models.greedy(folder / "model", adapter, prompts[name], 7)
        assert all(tokens[j] == expected for j in range(i, len(names), 4)), name
    assert (EagerPromptGraph.replays > 0) == replayed
    engine.check_idle()


class BorderUpTo64:
    """Of a strategy what `find` asks it."""

    def prompt_tier(self, ranks: list[int]) -> int:
        return 64 if 0 < sum(ranks) <= 64 else 0


def graphs_of(lora, kinds: tuple[tuple[int, int], ...]) -> PromptGraphs:
    """Graphs of three sizes of each (tier, ranks)."""
    graphs = PromptGraphs.__new__(PromptGraphs)
    graphs._lora = lora
    logits = torch.zeros(9, 1)
    graphs._graphs = {
        (tier, ranks): [
            PromptGraph(rows, samples, ranks, tier, 0, 0, logits) for rows, samples in ((64, 4), (128, 4), (256, 9))
        ]
        for tier, ranks in kinds
    }
    return graphs


def test_find_takes_the_border_where_the_ranks_fit_it_and_a_graph_has_it():
    graphs = graphs_of(BorderUpTo64(), ((0, 0), (0, 16), (0, 64), (64, 64)))
    for ranks, kind in (
        ([16] * 4, (64, 64)),
        ([40, 16], (64, 64)),
        ([16] * 5, (0, 16)),
        ([40, 32], (0, 64)),
        ([], (0, 0)),
    ):
        graph = graphs.find(1, 1, ranks)
        assert graph is not None
        assert (graph.tier, graph.ranks) == kind
    graph = graphs_of(BorderUpTo64(), ((0, 0), (0, 16))).find(1, 1, [16])
    assert graph is not None
    assert (graph.tier, graph.ranks) == (0, 16)


def test_find_takes_the_smallest_that_holds_rows_samples_and_ranks():
    graphs = graphs_of(NoLora(), ((0, 0), (0, 16), (0, 64)))

    def found(*asked) -> tuple[int, int] | None:
        graph = graphs.find(*asked)
        return None if graph is None else (graph.rows, graph.ranks)

    assert found(1, 0, []) == (64, 0)
    assert found(64, 4, [16, 8]) == (64, 16)
    assert found(65, 4, [17]) == (128, 64)
    assert found(2, 5, [3]) == (256, 16), "more samples than a smaller graph has rows of the head for"
    assert found(257, 1, []) is None
    assert found(1, 10, []) is None
    assert found(1, 1, [65]) is None
    assert found(1, 1, [8] * MAX_ADAPTERS) == (64, 16)
    assert found(1, 1, [8] * (MAX_ADAPTERS + 1)) is None


@pytest.mark.parametrize("most", [1, 63, 64, 65, 300, 2048, 5000, 8192])
def test_sizes_waste_little(most: int):
    sizes = sizes_up_to(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for small, large in itertools.pairwise(sizes):
        assert large - small <= max(128, small / 2)


@pytest.mark.parametrize("max_num_seqs", [1, 80, 300])
def test_a_captured_step_fits_the_buffer_though_it_is_cut_before_its_groups_are_known(max_num_seqs: int):
    groups = MAX_ADAPTERS + 1  # and rows without one
    for rows in range(1, 4200):
        room = max_packed(rows, max(max_num_seqs + 1, groups))
        for ranks in (FEW_RANKS, ANY_RANKS):
            block_m = block_m_for(rows, 1, ranks)
            assert max_tiles(rows, groups, block_m) * (TILE_FIELDS + block_m) <= room
