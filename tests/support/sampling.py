# SPDX-License-Identifier: Apache-2.0
"""Sequences for the sampler, and a sampler of six tokens."""

from __future__ import annotations

import torch

from multilora_backend.core import SamplingParams, Sequence
from multilora_backend.engine.sampler import Sampler

EOS = [0]
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])


def seq(prompt=(3,), output=(), seed=0, **sampling) -> Sequence:
    return Sequence(("t", 0, 0), len(prompt), [*prompt, *output], SamplingParams(**sampling), seed)


def sampler(vocab: int = len(LOGITS), device: str = "cpu") -> Sampler:
    return Sampler(vocab, EOS, torch.device(device))


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
