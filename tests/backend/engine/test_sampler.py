# SPDX-License-Identifier: Apache-2.0
"""Sampling: each parameter against its definition, and randomness that depends on nothing but the sequence."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from multilora_backend.core import Sequence
from sampling import LOGITS, sampler, seq

P = LOGITS.softmax(-1).tolist()


def tokens(logits: torch.Tensor, *sequences: Sequence) -> list[int]:
    pending = sampler(logits.shape[-1]).launch(logits.expand(len(sequences), -1), list(sequences))
    assert pending.token_ids.dtype == torch.int32
    ids = [s.token_id for s in pending.result()]
    assert pending.token_ids.tolist() == ids
    return ids


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


def test_greedy_rows_are_the_same_whoever_is_with_them():
    logits = torch.tensor([[0.0, 4.0, 4.0, 1.0], [math.nan, -math.inf, 2.0, 1.0], [math.nan] * 4])
    greedy = [seq(temperature=0.0) for _ in logits]
    assert [s.token_id for s in sampler(4).launch(logits, greedy).result()] == [1, 2, 0], "NaN is nobody's choice"
    for other in (seq(seed=1), seq(seed=1, top_p=0.5), seq(temperature=0.0, logit_bias={0: 1.0})):
        mixed = sampler(4).launch(torch.cat([logits, logits[:1]]), [*greedy, other]).result()
        assert [s.token_id for s in mixed[:3]] == [1, 2, 0]


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
    changed = seq(temperature=0.0, logit_bias={0: -100.0}, presence_penalty=1.0, output=[2])
    out = sampler().launch(logits, [changed, seq(temperature=0.0)]).result()
    assert [s.token_id for s in out] == [1, 0]
    assert torch.equal(logits, kept)


def test_logprobs_are_the_models_own():
    greedy = seq(temperature=0.0, logit_bias={3: 9.0}, logprobs=2)
    short, none = seq(temperature=0.0, logprobs=0), seq(temperature=0.0)
    out, plain, bare = sampler().launch(LOGITS.expand(3, -1), [greedy, none, short]).result()
    assert out.token_id == 3
    assert out.logprob == pytest.approx(math.log(P[3]), abs=1e-6)
    assert [(t.token_id, t.rank) for t in out.top] == [(3, 4), (0, 1), (1, 2)]
    assert out.top[1].logprob == pytest.approx(math.log(P[0]), abs=1e-6)
    assert plain.top is None
    assert plain.logprob is None
    assert [(t.token_id, t.rank) for t in bare.top] == [(0, 1)]


def test_draws_of_a_large_vocabulary_pass_the_chi_square_test():
    vocab, rounds, rows = 258, 20, 2000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    drawn = Counter()
    for i in range(rounds):  # one sequence per row, its tokens number 0, 1, ...: nearby seeds and nearby indices
        drawn.update(tokens(logits, *[seq(output=[3] * i, seed=row) for row in range(rows)]))
    expected = (logits.softmax(-1) * rounds * rows).tolist()
    chi_square = sum((drawn[i] - e) ** 2 / e for i, e in enumerate(expected))
    degrees = vocab - 1
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


def test_all_64_bits_of_the_seed_count():
    logits = torch.zeros(1000)
    seeds = [5, 5 + 2**32, 5 + 2**62, -5, -(2**63), 2**63 - 1, 2**63 + 7]
    drawn = tokens(logits, *[seq(seed=s) for s in seeds])
    assert len(set(drawn)) == len(seeds)
    assert tokens(logits, *[seq(seed=s) for s in seeds]) == drawn


def test_a_temperature_near_zero_is_greedy():
    assert tokens(LOGITS * 1000, seq(temperature=1e-40), seq(temperature=2e-5)) == [0, 0]
