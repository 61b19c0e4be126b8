# SPDX-License-Identifier: Apache-2.0
"""The sampler from step to step: rows that do not know of each other, and what it keeps of a sequence."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from multilora_backend.core import Sequence
from multilora_backend.engine import sampler as module
from multilora_backend.engine.sampler import sample
from sampling import EOS, LOGITS, everything, sampler, seq


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_what_it_would_be_alone(dtype: torch.dtype):
    sequences, vocab = everything(), 41
    logits = (3 * torch.randn(len(sequences), 64)).to(dtype)[:, :vocab]  # rows farther apart than they are long
    mixed = sampler(vocab).launch(logits, sequences).result()
    for row, sequence in enumerate(sequences):
        alone = sampler(vocab).launch(logits[row : row + 1].contiguous(), [sequence]).result()
        assert mixed[row : row + 1] == alone


def test_nan_stays_in_its_row():
    sequences = everything()
    logits = torch.randn(len(sequences), 41)
    clean = sampler(41).launch(logits, sequences).result()
    for row in range(len(sequences)):
        broken = logits.clone()
        broken[row] = torch.nan
        out = sampler(41).launch(broken, sequences).result()
        assert 0 <= out[row].token_id < 41
        assert out[:row] + out[row + 1 :] == clean[:row] + clean[row + 1 :]


def overlapped(logits: torch.Tensor, sequences: list[Sequence], device: str = "cpu") -> list[list[int]]:
    """Tokens of each step, every step launched before the one before it has been read; row 0 sits out every third."""
    one, before = sampler(logits.shape[-1], device), None
    for step, rows in enumerate(logits):
        running = sequences[step % 3 == 2 :]
        now = (one.launch(rows[: len(running)], running), running, [len(s.token_ids) for s in running])
        for sequence in running:
            sequence.token_ids.append(-1)
        for pending, drawn, places in [before] if before else []:
            for sampled, sequence, place in zip(pending.result(), drawn, places, strict=True):
                sequence.token_ids[place] = sampled.token_id
        before = now
    pending, drawn, places = before
    for sampled, sequence, place in zip(pending.result(), drawn, places, strict=True):
        sequence.token_ids[place] = sampled.token_id
    return [s.token_ids for s in sequences]


def waiting(logits: torch.Tensor, sequences: list[Sequence]) -> list[list[int]]:
    """The same by a sampler that keeps nothing from step to step: penalties are computed from the token ids."""
    for step, rows in enumerate(logits):
        running = sequences[step % 3 == 2 :]
        for sampled, sequence in zip(sample(rows[: len(running)], running, EOS), running, strict=True):
            sequence.token_ids.append(sampled.token_id)
    return [s.token_ids for s in sequences]


def test_penalties_of_tokens_that_the_host_does_not_know_yet():
    logits = torch.randn(12, len(everything()), 41, generator=torch.Generator().manual_seed(2))
    logits[1:] = logits[0]  # without penalties the greedy rows would say the same token again and again
    expected = waiting(logits, everything())
    assert overlapped(logits, everything()) == expected
    assert len(set(expected[5][-12:])) > 1


def test_a_penalty_without_the_tokens_is_refused():
    unknown = seq(presence_penalty=1.0, output=[-1])
    with pytest.raises(RuntimeError, match="not on the host"):
        sampler().launch(LOGITS[None], [unknown])


def test_forget_frees_what_a_sequence_had():
    def alive() -> int:
        gc.collect()
        return sum(type(each) is Sequence for each in gc.get_objects())

    one, before = sampler(), alive()
    for _ in range(20):
        sequence = seq(presence_penalty=1.0, logit_bias={1: 2.0}, output=[2, 2])
        one.launch(LOGITS[None], [sequence]).result()
        one.forget(sequence)
        one.forget(sequence)
    assert alive() == before + 1
    assert one._penalties._said.shape[0] < 20, "rows are used again"


def test_a_row_used_again_remembers_nothing():
    one, logits = sampler(), torch.tensor([0.0, 4.0, 3.0, 2.5, 0.0, 0.0])
    said = [seq(temperature=0.0, presence_penalty=2.0, output=[1, 2]) for _ in range(8)]
    assert {s.token_id for s in one.launch(logits.expand(8, -1), said).result()} == {3}
    for sequence in said:
        one.forget(sequence)
    fresh = [seq(temperature=0.0, presence_penalty=2.0) for _ in range(8)]
    assert {s.token_id for s in one.launch(logits.expand(8, -1), fresh).result()} == {1}


def test_counts_outlive_the_arrival_of_more_sequences():
    one, logits = sampler(), torch.tensor([0.0, 4.0, 3.0, 2.5, 0.0, 0.0])
    first = [seq(temperature=0.0, presence_penalty=2.0) for _ in range(3)]
    assert {s.token_id for s in one.launch(logits.expand(3, -1), first).result()} == {1}
    for sequence in first:
        sequence.token_ids.append(-1)
    more = [*first, *(seq(temperature=0.0, presence_penalty=2.0, output=[1, 2]) for _ in range(30))]
    assert [s.token_id for s in one.launch(logits.expand(33, -1), more).result()] == [2] * 3 + [3] * 30


def test_counts_outlive_an_arrival_that_fails(monkeypatch: pytest.MonkeyPatch):
    def die(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck")

    one, logits = sampler(), torch.tensor([0.0, 4.0, 3.0, 2.5, 0.0, 0.0])
    first = [seq(temperature=0.0, presence_penalty=2.0) for _ in range(3)]
    for token in (1, 2):
        assert {s.token_id for s in one.launch(logits.expand(3, -1), first).result()} == {token}
        for sequence in first:
            sequence.token_ids.append(-1)
    more = [seq(temperature=0.0, presence_penalty=2.0, output=[1, 2]) for _ in range(30)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", die)
        with pytest.raises(RuntimeError, match="out of luck"):
            one.launch(logits.expand(30, -1), more)
    for sequence in more:
        one.forget(sequence)
    assert {s.token_id for s in one.launch(logits.expand(3, -1), first).result()} == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_warm_up_meets_every_variant_of_the_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    names, met = ("draw", "draw_greedy", "truncate"), set()

    def noting(name: str, function: Callable) -> Callable:
        def called(logits: torch.Tensor, *given: Any) -> Any:
            truncated = name == "draw" and given[-1] is not None
            met.add((name, logits.dtype, logits.stride(), truncated))
            return function(logits, *given)

        return called

    for name in names:
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    vocab = 41
    logits = torch.randn(1, vocab).to(dtype)
    sampler(vocab).warm_up(logits)
    warm, sequences = met.copy(), everything()
    greedy = [s for s in sequences if s.sampling.temperature == 0]
    adjusted = [s for s in sequences if s.sampling.logit_bias or s.sampling.presence_penalty]
    plain = [s for s in sequences if s not in adjusted and s.sampling.repetition_penalty == 1]
    for some in (sequences, greedy, adjusted, plain, *([one] for one in sequences)):
        sampler(vocab).launch(logits.expand(len(some), -1).contiguous(), some).result()
    assert met == warm
    assert {(name, kind) for name, kind, *_ in met} == {
        (name, kind) for name in names for kind in (dtype, torch.float32)
    }


def test_logits_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="expected"):
        sampler().launch(LOGITS[None], [seq(), seq()])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_on_the_gpu_and_tokens_are_the_cpus(dtype: torch.dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
    vocab, rows = 5000, len(everything())
    logits = (3 * torch.randn(6, rows, vocab, generator=torch.Generator().manual_seed(3))).to(dtype)
    on_gpu = logits.cuda()
    one = sampler(vocab, "cuda")
    one.warm_up(on_gpu[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sequences, pending = everything(), []
        for step in on_gpu:
            pending.append(one.launch(step, sequences))
            for sequence in sequences:
                sequence.token_ids.append(-1)
        greedy = [seq(temperature=0.0) for _ in range(rows)]
        pending.append(one.launch(on_gpu[0], greedy))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    drawn = [[s.token_id for s in p.result()] for p in pending]
    assert [p.token_ids.tolist() for p in pending] == drawn
    two, sequences, expected = sampler(vocab), everything(), []
    for step in logits:
        expected.append([s.token_id for s in two.launch(step, sequences).result()])
        for sequence, token in zip(sequences, expected[-1], strict=True):
            sequence.token_ids.append(token)
    assert drawn == [*expected, two.launch(logits[0], greedy).token_ids.tolist()]


@pytest.mark.gpu
def test_overlap_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
    logits = torch.randn(12, len(everything()), 1030, generator=torch.Generator().manual_seed(4))
    assert overlapped(logits.cuda(), everything(), "cuda") == waiting(logits, everything())
