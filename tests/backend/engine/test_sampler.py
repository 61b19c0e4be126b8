# SPDX-License-Identifier: Apache-2.0
"""Sampling: each parameter against its definition, and randomness that depends on nothing but the sequence."""

from __future__ import annotations

import gc
import math
from collections import Counter

import pytest
import torch

from multilora_backend.core import SamplingParams, Sequence
from multilora_backend.engine.sampler import Sampler, sample

EOS = [0]
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
P = LOGITS.softmax(-1).tolist()


def seq(prompt=(3,), output=(), seed=0, **sampling) -> Sequence:
    return Sequence(("t", 0, 0), len(prompt), [*prompt, *output], SamplingParams(**sampling), seed)


def sampler(vocab: int = len(LOGITS), device: str = "cpu") -> Sampler:
    return Sampler(vocab, EOS, torch.device(device))


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


def everything() -> list[Sequence]:
    """Every parameter in one batch, several at once, and rows that ask for nothing."""
    return [
        seq(temperature=0.0),
        seq(seed=1),
        seq(seed=2, temperature=0.7, top_k=5, logprobs=3),
        seq(seed=3, top_p=0.6, output=[7]),
        seq(seed=4, min_p=0.1, logit_bias={2: 3.0, 4: -100.0}),
        seq(seed=5, temperature=0.0, repetition_penalty=1.5, prompt=(1, 2, 2, 9), output=[4, 4, 4]),
        seq(seed=6, presence_penalty=0.9, frequency_penalty=0.4, output=[1, 2, 1], logprobs=0),
        seq(seed=7, min_tokens=4, stop_token_ids=(5, 6), logit_bias={5: 50.0}, output=[1]),
        seq(
            seed=8, top_k=9, top_p=0.9, min_p=0.01, presence_penalty=1.0, logit_bias={3: 1.0}, min_tokens=9, logprobs=2
        ),
        seq(seed=9, temperature=0.0, logprobs=1),
    ]


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
