# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens, each row by its own parameters and its own random numbers.

Randomness is a function of (sequence's seed, number of output tokens) only, so a request with a seed gives
the same tokens whatever shares its batch. A token is drawn as argmax(p / e) with e ~ Exp(1), which picks
token i with probability p_i (the exponential-race form of the Gumbel-max trick).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multilora_backend.core import SamplingParams, Sequence
from multilora_backend.protocol import TokenLogprob


@dataclass(frozen=True)
class Sampled:
    token_id: int
    logprob: float | None = None
    """Of the sampled token under the model's own distribution; None if not asked for."""
    top: list[TokenLogprob] | None = None
    """The sampled token, then the likeliest `logprobs` ones; None if not asked for."""


def sample(logits: Tensor, sequences: list[Sequence], eos_token_ids: list[int]) -> list[Sampled]:
    """Draws the next token of each sequence. logits `[B, vocab]` of any float dtype; row i is sequence i's."""
    raw = logits.float()
    adjusted = raw
    if any(_adjusts(s) for s in sequences):
        adjusted = raw.clone()
        for row, sequence in zip(adjusted, sequences, strict=True):
            _adjust(row, sequence, eos_token_ids)
    tokens = adjusted.argmax(-1)
    drawn = [i for i, s in enumerate(sequences) if s.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(adjusted[drawn], [sequences[i] for i in drawn])
    ids = tokens.tolist()
    wanted = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
    logprobs = dict(zip(wanted, raw[wanted].log_softmax(-1), strict=True)) if wanted else {}
    return [
        _report(ids[i], logprobs[i], s.sampling.logprobs or 0) if i in logprobs else Sampled(ids[i])
        for i, s in enumerate(sequences)
    ]


def _adjusts(sequence: Sequence) -> bool:
    p = sequence.sampling
    return (
        p.repetition_penalty != 1.0
        or p.presence_penalty != 0.0
        or p.frequency_penalty != 0.0
        or p.logit_bias is not None
        or sequence.num_output_tokens < p.min_tokens
    )


def _adjust(row: Tensor, sequence: Sequence, eos_token_ids: list[int]) -> None:
    """Penalties, bias and min_tokens, in place on one row `[vocab]`.

    repetition_penalty counts prompt and output (Keskar et al., CTRL, 2019); presence and frequency count the
    output only (OpenAI's definition: logit - count * frequency - (count > 0) * presence).
    """
    p, vocab = sequence.sampling, row.shape[0]
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    output = sequence.token_ids[sequence.prompt_len :]
    if output and (p.presence_penalty or p.frequency_penalty):
        counts = torch.bincount(torch.tensor(output, device=row.device), minlength=vocab)
        row -= counts * p.frequency_penalty + (counts > 0) * p.presence_penalty
    if p.logit_bias:
        index = torch.tensor(list(p.logit_bias), device=row.device)
        row[index] += torch.tensor(list(p.logit_bias.values()), device=row.device)
    if sequence.num_output_tokens < p.min_tokens:
        row[list({*eos_token_ids, *p.stop_token_ids})] = -torch.inf


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    params = [s.sampling for s in sequences]
    scaled = logits / logits.new_tensor([p.temperature for p in params])[:, None]
    if any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params):
        scaled = _truncate(scaled, params)
    noise = torch.stack([_exponential(s, logits.shape[1]) for s in sequences]).to(logits.device)
    return (scaled.softmax(-1) / noise).argmax(-1)


def _truncate(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Sets to -inf what top_k, top_p and min_p exclude. The likeliest token always stays."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    vocab = logits.shape[1]
    top_k = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=logits.device)
    ordered = ordered.masked_fill(torch.arange(vocab, device=logits.device) >= top_k[:, None], -torch.inf)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    drop = before >= logits.new_tensor([p.top_p for p in params])[:, None]
    drop |= probs < probs[:, :1] * logits.new_tensor([p.min_p for p in params])[:, None]
    drop[:, 0] = False
    # top_p = 1 keeps everything: without this a cumulative sum that rounds to 1.0 early would cut the tail.
    full = torch.tensor([p.top_p >= 1.0 and p.min_p <= 0.0 for p in params], device=logits.device)
    ordered = ordered.masked_fill(drop & ~full[:, None], -torch.inf)
    return torch.empty_like(logits).scatter_(-1, index, ordered)


def _exponential(sequence: Sequence, vocab: int) -> Tensor:
    """Exp(1) noise `[vocab]` for the sequence's next token; splitmix64's increment spreads nearby seeds apart."""
    state = (sequence.seed + (sequence.num_output_tokens + 1) * 0x9E3779B97F4A7C15) % 2**63
    generator = torch.Generator().manual_seed(state)
    return torch.empty(vocab).exponential_(generator=generator)


def _report(token_id: int, logprobs: Tensor, top: int) -> Sampled:
    chosen = float(logprobs[token_id])
    entries = [TokenLogprob(token_id, chosen, int((logprobs > chosen).sum()) + 1)]
    if top:
        values, ids = logprobs.topk(top)
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        entries += [TokenLogprob(i, v, rank) for rank, (i, v) in enumerate(pairs, start=1)]
    return Sampled(token_id, chosen, entries)
