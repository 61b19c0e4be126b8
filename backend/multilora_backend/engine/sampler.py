# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens, each row by its own parameters and its own random numbers, without the host ever waiting.

Randomness is a function of (sequence's seed, number of output tokens) only, so a request with a seed gives the same
tokens whatever shares its batch. A step may be launched while the one before it still runs: a sequence's newest token
can be a placeholder on the host, so nothing here reads its value; penalties count tokens on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from multilora_backend.core import SamplingParams, Sequence
from multilora_backend.engine.penalties import Penalties
from multilora_backend.engine.staging import Copies, Staging
from multilora_backend.protocol import TokenLogprob
from multilora_kernels.draw import draw, draw_greedy
from multilora_kernels.truncate import truncate

GREEDY_BELOW = 1e-5
"""Temperatures below are 0: the likeliest token wins by more than any noise, and logit / temperature may overflow."""


@dataclass(frozen=True)
class Sampled:
    token_id: int
    logprob: float | None = None
    """Of the sampled token under the model's own distribution; None if not asked for."""
    top: list[TokenLogprob] | None = None
    """The sampled token, then the likeliest `logprobs` ones; None if not asked for."""


class Sampler:
    """Draws the next token of each sequence; one thread, one stream."""

    def __init__(self, vocab_size: int, eos_token_ids: list[int], device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._staging = Staging(device)
        self._penalties = Penalties(vocab_size, device)
        self._biases: dict[Sequence, _Bias] = {}

    @torch.inference_mode()
    def launch(self, logits: Tensor, sequences: list[Sequence]) -> Pending:
        """Queues the draw of every sequence's token number `num_output_tokens` on the current stream.

        logits: [B, vocab] of any float dtype, row i sequence i's; rows may be strided. They are not changed. They have
        more columns if an adapter knows more tokens than the model.
        """
        count, width = logits.shape
        if count != len(sequences) or width < self._vocab_size:
            raise ValueError(f"logits {tuple(logits.shape)}, expected {(len(sequences), self._vocab_size)} or wider")
        self._penalties.widen(width)
        copies, wants = Copies(self._staging), _Wants(sequences)
        given = copies.upload(self._parameters(sequences, wants, copies, width))
        token_ids = self._draw(self._adjust(logits, wants, given), wants, given)
        if wants.penalties:
            drawn = token_ids.index_select(0, given["penalised"])
            self._penalties.count([sequences[i] for i in wants.penalties], given["said"], drawn)
        results = [token_ids]
        if wants.logprobs:
            most = max(sequences[i].sampling.logprobs or 0 for i in wants.logprobs)
            at = given["reported"]
            results += _logprobs(logits.index_select(0, at), token_ids.index_select(0, at), most)
        return Pending(token_ids, copies, copies.download(*results), [s.sampling.logprobs for s in sequences])

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended: what the sampler keeps of it goes. Most have nothing here."""
        self._penalties.forget(sequence)
        self._biases.pop(sequence, None)

    def warm_up(self, logits: Tensor) -> None:
        """Compiles every kernel that a request could wait for; `logits` [B, vocab] as the model makes them."""
        for bias in (None, {0: 1.0}):  # adjusted logits are fp32 with dense rows, which takes kernels of their own
            for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5)):
                sampling = SamplingParams(
                    temperature=temperature,
                    top_p=top_p,
                    logprobs=1,
                    logit_bias=bias,
                    presence_penalty=0.5 if bias else 0.0,
                )
                sequences = [Sequence(("warm-up", 0, row), 1, [0], sampling, 0) for row in range(len(logits))]
                self.launch(logits, sequences).result()
                for sequence in sequences:
                    self.forget(sequence)

    def _parameters(
        self, sequences: list[Sequence], wants: _Wants, copies: Copies, width: int
    ) -> dict[str, NDArray[Any]]:
        """What the device must know, by name: nothing for a greedy batch."""
        given: dict[str, NDArray[Any]] = {}
        if wants.penalties:
            penalised = [sequences[i] for i in wants.penalties]
            given["penalised"] = np.array(wants.penalties, np.int64)
            given["said"] = np.array(self._penalties.rows_of(penalised, copies), np.int64)
            for name in ("repetition", "presence", "frequency"):
                given[name] = _column(penalised, f"{name}_penalty")
        if wants.biases:
            given["bias_places"], given["biases"] = self._bias(sequences, wants.biases, width)
        if wants.noise:
            given["temperature"] = _column(sequences, "temperature")
            given["temperature"][given["temperature"] < GREEDY_BELOW] = 0
            given["seed"] = np.array([s.seed & (2**64 - 1) for s in sequences], np.uint64).view(np.int64)
            given["index"] = np.array([s.num_output_tokens for s in sequences], np.int32)
        if wants.truncation:
            given["top_k"] = _column(sequences, "top_k", np.int32)
            given["top_p"], given["min_p"] = _column(sequences, "top_p"), _column(sequences, "min_p")
        if wants.logprobs:
            given["reported"] = np.array(wants.logprobs, np.int64)
        return given

    def _adjust(self, logits: Tensor, wants: _Wants, given: dict[str, Tensor]) -> Tensor:
        """The logits after penalties, logit_bias and min_tokens: fp32 and a copy if any row asks for one of them."""
        if not wants.penalties and not wants.biases:
            return logits
        logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if wants.penalties:
            strengths = (given[name] for name in ("repetition", "presence", "frequency"))
            rows = logits.index_select(0, given["penalised"])
            logits.index_copy_(0, given["penalised"], self._penalties.apply(rows, given["said"], *strengths))
        if wants.biases:
            logits.view(-1).index_add_(0, given["bias_places"], given["biases"])
        return logits

    def _draw(self, logits: Tensor, wants: _Wants, given: dict[str, Tensor]) -> Tensor:
        if not wants.noise:
            return draw_greedy(logits)
        kept = None
        if wants.truncation:
            kept = truncate(logits, given["temperature"], given["top_k"], given["top_p"], given["min_p"])
        return draw(logits, given["temperature"], given["seed"], given["index"], kept)

    def _bias(
        self, sequences: list[Sequence], rows: list[int], width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(places in the flat logits, what to add there) for these rows' logit_bias and min_tokens."""
        places, values = [], []
        for row in rows:
            sequence = sequences[row]
            bias = self._biases.get(sequence)
            if bias is None:
                bias = self._biases[sequence] = _Bias.of(sequence.sampling, self._eos_token_ids)
            places.append(bias.tokens + row * width)
            values.append(bias.values)
            if sequence.num_output_tokens < sequence.sampling.min_tokens:
                places.append(bias.ends + row * width)
                values.append(np.full(len(bias.ends), -np.inf, np.float32))
        return np.concatenate(places), np.concatenate(values)


class Pending:
    """Tokens that are being drawn."""

    def __init__(self, token_ids: Tensor, copies: Copies, host: list[Tensor], logprobs: list[int | None]) -> None:
        self.token_ids = token_ids
        """[B] int32 on the device, valid in stream order."""
        self._copies = copies
        self._host = host
        self._logprobs = logprobs
        self._sampled: list[Sampled] | None = None

    def result(self) -> list[Sampled]:
        """Waits until the tokens are on the host."""
        if self._sampled is None:
            self._copies.wait()
            self._sampled = self._read()
            self._copies.release()
        return self._sampled

    def _read(self) -> list[Sampled]:
        token_ids, *reports = (tensor.tolist() for tensor in self._host)
        if not reports:
            return [Sampled(token) for token in token_ids]
        rows = zip(*reports, strict=True)
        return [
            Sampled(token) if wanted is None else _report(token, wanted, *next(rows))
            for token, wanted in zip(token_ids, self._logprobs, strict=True)
        ]


class _Wants:
    """Which rows of a batch ask for what; a pure greedy batch asks for nothing."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.noise = self.truncation = False
        self.penalties: list[int] = []
        self.biases: list[int] = []
        self.logprobs: list[int] = []
        for row, sequence in enumerate(sequences):
            p = sequence.sampling
            if p.temperature >= GREEDY_BELOW:
                self.noise = True
                if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0:
                    self.truncation = True
            if p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0:
                self.penalties.append(row)
            if p.logit_bias is not None or sequence.num_output_tokens < p.min_tokens:
                self.biases.append(row)
            if p.logprobs is not None:
                self.logprobs.append(row)


@dataclass(frozen=True)
class _Bias:
    """A sequence's logit_bias, and the tokens that must not be drawn before min_tokens."""

    tokens: NDArray[np.int64]
    values: NDArray[np.float32]
    ends: NDArray[np.int64]

    @staticmethod
    def of(sampling: SamplingParams, eos_token_ids: list[int]) -> _Bias:
        bias = sampling.logit_bias or {}
        ends = sorted({*eos_token_ids, *sampling.stop_token_ids})
        return _Bias(
            np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32), np.array(ends, np.int64)
        )


def _column(sequences: list[Sequence], name: str, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    return np.array([getattr(s.sampling, name) for s in sequences], dtype)


def _logprobs(logits: Tensor, tokens: Tensor, most: int) -> list[Tensor]:
    """(logprob and rank of each row's token, [R]; the `most` likeliest tokens and their logprobs, [R, most])."""
    x = logits.float()
    total = x.logsumexp(-1, keepdim=True)
    chosen = x.gather(1, tokens[:, None].long())
    top = x.topk(min(most, x.shape[1]))
    return [(chosen - total)[:, 0], (x > chosen).sum(-1) + 1, top.indices, top.values - total]


def _report(token: int, wanted: int, logprob: float, rank: int, ids: list[int], logprobs: list[float]) -> Sampled:
    top = zip(ids[:wanted], logprobs[:wanted], strict=True)
    likeliest = [TokenLogprob(i, value, place) for place, (i, value) in enumerate(top, start=1)]
    return Sampled(token, logprob, [TokenLogprob(token, logprob, rank), *likeliest])


def sample(logits: Tensor, sequences: list[Sequence], eos_token_ids: list[int]) -> list[Sampled]:
    """Draws one step's tokens and waits for them."""
    return Sampler(logits.shape[1], eos_token_ids, logits.device).launch(logits, sequences).result()
