# SPDX-License-Identifier: Apache-2.0
"""Sampling: each parameter against its definition, and randomness that depends on nothing but the sequence."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from multilora_backend.core import SamplingParams, Sequence
from multilora_backend.engine.sampler import sample

EOS = [0]
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
P = LOGITS.softmax(-1).tolist()


def seq(prompt=(5,), output=(), seed=0, **sampling) -> Sequence:
    return Sequence(("t", 0, 0), len(prompt), [*prompt, *output], SamplingParams(**sampling), seed)


def tokens(logits: torch.Tensor, *sequences: Sequence) -> list[int]:
    return [s.token_id for s in sample(logits.expand(len(sequences), -1), list(sequences), EOS)]


def frequencies(n: int = 4000, **sampling) -> list[float]:
    counts = Counter(tokens(LOGITS, *[seq(seed=i, **sampling) for i in range(n)]))
    return [counts[i] / n for i in range(len(LOGITS))]


def assert_distribution(measured: list[float], expected: list[float], n: int = 4000) -> None:
    for m, p in zip(measured, expected, strict=True):
        assert abs(m - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-12, "more than five standard deviations off"


def renormalised(kept: list[int]) -> list[float]:
    total = sum(P[i] for i in kept)
    return [P[i] / total if i in kept else 0.0 for i in range(len(P))]


def test_temperature_zero_is_greedy():
    assert tokens(LOGITS, seq(temperature=0.0), seq(temperature=0.0, seed=9)) == [0, 0]


def test_draws_follow_the_softmax():
    assert_distribution(frequencies(), P)


def test_temperature_divides_the_logits():
    assert_distribution(frequencies(temperature=0.5), (LOGITS / 0.5).softmax(-1).tolist())


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 1e-9}, [0]),
        ({"top_p": P[0]}, [0]),
        ({"top_p": P[0] + 1e-4}, [0, 1]),
        ({"top_p": P[0] + P[1] + 1e-4}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        ({"min_p": math.exp(-1.01)}, [0, 1, 2]),
        ({"top_k": 4, "top_p": 0.5}, [0, 1]),
    ],
)
def test_truncation_keeps_exactly(sampling: dict, kept: list[int]):
    assert_distribution(frequencies(2000, **sampling), renormalised(kept), 2000)


def test_equal_logits_with_top_k_keep_exactly_k():
    flat = torch.zeros(6)
    assert len(set(tokens(flat, *[seq(seed=i, top_k=2) for i in range(200)]))) == 2


def test_a_draw_depends_on_seed_and_position_only():
    target = seq(seed=1234)
    alone = tokens(LOGITS, target)
    crowd = [seq(seed=i, temperature=0.3, top_k=2) for i in range(7)]
    assert tokens(LOGITS, *crowd, target)[-1] == alone[0]
    sequences = [seq(output=[1] * n, seed=1234) for n in range(64)]
    assert len(set(tokens(LOGITS, *sequences))) > 1, "every position draws anew"


def test_min_tokens_hides_the_ends():
    peaked = torch.tensor([9.0, 8.0, 7.0, 0.0])
    hidden = seq(temperature=0.0, min_tokens=2, stop_token_ids=(1,), output=[3])
    shown = seq(temperature=0.0, min_tokens=2, stop_token_ids=(1,), output=[3, 3])
    assert tokens(peaked, hidden, shown) == [2, 0]


def test_penalties_by_their_definitions():
    greedy = {"temperature": 0.0}
    logits = torch.tensor([0.0, 4.0, 3.0, 2.5])
    # presence: once for a token that was said; frequency: for each time; the prompt does not count
    assert tokens(logits, seq(prompt=(1,), presence_penalty=2.0, **greedy)) == [1]
    assert tokens(logits, seq(output=[1], presence_penalty=0.9, **greedy)) == [1]
    assert tokens(logits, seq(output=[1], presence_penalty=1.1, **greedy)) == [2]
    assert tokens(logits, seq(output=[1, 1, 1], frequency_penalty=0.3, **greedy)) == [1]
    assert tokens(logits, seq(output=[1, 1, 1], frequency_penalty=0.4, **greedy)) == [2]
    # repetition divides positive and multiplies negative logits, prompt included
    assert tokens(logits, seq(prompt=(1,), repetition_penalty=1.3, **greedy)) == [1]
    assert tokens(logits, seq(prompt=(1,), repetition_penalty=1.4, **greedy)) == [2]
    assert tokens(-logits - 1, seq(prompt=(0,), repetition_penalty=4.0, **greedy)) == [3]


def test_logit_bias_is_added():
    assert tokens(LOGITS, seq(temperature=0.0, logit_bias={5: 3.1})) == [5]
    assert tokens(LOGITS, seq(temperature=0.0, logit_bias={5: 2.9})) == [0]


def test_adjusting_one_row_leaves_the_others_and_the_input():
    logits = LOGITS.repeat(2, 1)
    kept = logits.clone()
    out = sample(logits, [seq(temperature=0.0, logit_bias={0: -100.0}), seq(temperature=0.0)], EOS)
    assert [s.token_id for s in out] == [1, 0]
    assert torch.equal(logits, kept)


def test_logprobs_are_the_models_own():
    greedy = seq(temperature=0.0, logit_bias={3: 9.0}, logprobs=2)
    [out] = sample(LOGITS[None], [greedy], EOS)
    assert out.token_id == 3
    assert out.logprob == pytest.approx(math.log(P[3]), abs=1e-6)
    assert [(t.token_id, t.rank) for t in out.top] == [(3, 4), (0, 1), (1, 2)]
    assert out.top[1].logprob == pytest.approx(math.log(P[0]), abs=1e-6)
    [plain] = sample(LOGITS[None], [seq(logprobs=None)], EOS)
    assert plain.top is None
