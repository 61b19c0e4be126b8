# SPDX-License-Identifier: Apache-2.0
"""Logits where a graph wants them: to the bit those of a step without a place of its own, whatever the model's end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_models
from extras_models import save_trained
from multilora_backend.core import Sequence
from multilora_kernels import block_m_for, row_step
from step_lab import StepLab

VOCAB = 61
IN_PLACE = {
    "llama": True,
    "granite": False,  # divides by logits_scaling
    "gemma2": False,  # caps
    "gemma3_text": True,
    "mixtral": True,
}
"""Whether a family's logits are what its head gives."""
Spans = list[tuple[Sequence, int, int]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., StepLab]]:
    labs: list[StepLab] = []

    def made(family: str, num_experts_per_tok: int = 0, **settings: Any) -> StepLab:
        sparse = {"num_experts_per_tok": num_experts_per_tok} if num_experts_per_tok else {}
        gpu_models.save_model(tmp_path / "model", family, tie_word_embeddings=False, **sparse)
        # Knows one token less than the model.
        save_trained(
            tmp_path / "model", tmp_path / "adapters" / "fewer", vocabulary=VOCAB - 1, target_modules=["q_proj"]
        )
        labs.append(StepLab(tmp_path / "model", tmp_path / "adapters", **settings))
        return labs[-1]

    yield made
    for lab in labs:
        lab.close()


def spans_of(lab: StepLab) -> Spans:
    """A chunk and two single rows; nothing of it depends on KV from another step."""
    return [(lab.sequence("", [5, 6, 7, 8]), 0, 4), (lab.sequence("", [9]), 0, 1), (lab.sequence("", [10]), 0, 1)]


def place(lab: StepLab, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer that holds no logits yet, and the part of it for so many rows."""
    buffer = torch.full((rows + 3, VOCAB), torch.nan, dtype=lab.engine.runner._model.dtype)
    return buffer, buffer[:rows]


@pytest.mark.parametrize("family", IN_PLACE)
def test_every_row_lies_in_its_place(make: Callable[..., StepLab], family: str):
    lab = make(family)
    spans = spans_of(lab)
    expected = lab.logits(*spans)
    buffer, out = place(lab, 6)
    ends: list[torch.Tensor] = []
    lab.engine.runner._model.module.register_forward_hook(lambda *given: ends.append(given[-1].logits[0]))
    logits = lab.logits(*spans, out=out)
    assert logits.is_set_to(out)
    assert out.isfinite().all()
    assert torch.equal(out, expected), "bit for bit"
    assert buffer[6:].isnan().all()
    assert [end.is_set_to(out) for end in ends] == [IN_PLACE[family]], "copied only if the model made new tensors"


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_sampled_rows_lie_in_their_place(make: Callable[..., StepLab], family: str):
    """As in a step in pieces of graph, whose head computes the rows that sample, and its queries a fixed address."""
    lab = make(family)
    expected = lab.logits(*spans_of(lab))
    runner = lab.engine.runner
    buffer, out = place(lab, 2)
    runner._inputs.device("sample_rows", 2).copy_(torch.tensor([3, 5]))
    layer = runner._model.module.model.layers[0].self_attn
    query = torch.full((6, layer.num_heads, layer.head_dim), torch.nan, dtype=out.dtype)
    with torch.inference_mode():
        logits = runner.forward(runner._attention, 6, 2, query, out)
        alone = runner.forward(runner._attention, 6, 2)
    assert logits.is_set_to(out)
    assert torch.equal(out, alone)
    tolerance = 4 * torch.finfo(out.dtype).eps * expected.abs().max()  # fewer rows may be multiplied in another order
    assert (out - expected[[3, 5]]).abs().max() <= tolerance
    assert buffer[2:].isnan().all()


def test_warm_up_samples_from_longer_rows_if_adapters_may_make_them(make: Callable[..., StepLab], monkeypatch):
    for room, expected in ((0, {VOCAB, VOCAB + 1, 64}), (1, {VOCAB})):
        runner = make("llama", adapter_extras_bytes=room).engine.runner
        launch, widths = runner.sampler.launch, set()

        def noting(logits: torch.Tensor, sequences: list[Sequence], launch=launch, widths=widths) -> Any:
            widths.add(logits.shape[1])
            return launch(logits, sequences)

        monkeypatch.setattr(runner.sampler, "launch", noting)
        runner.warm_up(4)
        assert widths == expected, "1 byte has no room for what an adapter may have"


def test_warm_up_meets_the_kernels_of_visits_to_experts(make: Callable[..., StepLab], monkeypatch):
    """129 to 512 rows of four visits each: tiles of 16 rows, but as many rows as have variants of their own."""
    runner = make("qwen3_moe", num_experts_per_tok=4, max_num_batched_tokens=600).engine.runner
    visits, met = runner._lora.visits, set()

    def noting(rows: torch.Tensor, experts: torch.Tensor, num_experts: int) -> Any:
        if runner._lora._segments is not None:
            ranks = runner._lora._segments.plan.rank_block
            met.add((ranks, block_m_for(len(experts), num_experts, ranks), row_step(len(experts))))
        return visits(rows, experts, num_experts)

    monkeypatch.setattr(runner._lora, "visits", noting)
    runner.warm_up(600)
    assert met == {(ranks, *tiles) for ranks in (16, 32) for tiles in ((16, 0), (16, 1), (16, 2), (32, 2))}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_token_that_an_adapter_does_not_know_is_bound_there_too(make: Callable[..., StepLab], family: str):
    lab = make(family)
    spans = [(lab.sequence(name, [token]), 0, 1) for token, name in ((5, ""), (6, "fewer"), (7, ""))]
    expected = lab.logits(*spans)
    _, out = place(lab, 3)
    assert lab.logits(*spans, out=out).is_set_to(out)
    assert torch.equal(out, expected)
    assert out.isneginf().nonzero().tolist() == [[1, VOCAB - 1]]
