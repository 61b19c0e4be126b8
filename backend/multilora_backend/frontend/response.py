# SPDX-License-Identifier: Apache-2.0
"""The engine's outputs of one request to the tensors of its responses, as Triton's vllm_backend has them.

A stream's responses are deltas and merge whatever waits; without streaming there is exactly one response.
"""

from __future__ import annotations

import json

import numpy as np

from multilora_backend.core import FinishReason, SamplingParams
from multilora_backend.frontend.detokenizer import Detokenizer
from multilora_backend.frontend.request import GenerateRequest
from multilora_backend.frontend.tokenizer import Tokenizer
from multilora_backend.protocol import Output, TokenLogprob

RUNNING = "None"
"""finish_reason of a sequence that goes on: vllm_backend sends Python's str(None), and its clients compare with it."""
_LOWEST = -9999.0
"""JSON has no -Infinity; vLLM's servers write the same number for it."""


class _Stream:
    """One of the n sequences: its text, and what has come since the last response."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self.detokenizer = Detokenizer(tokenizer, sampling)
        self.drop_stop_token = not sampling.include_stop_str_in_output
        self.finish_reason: FinishReason | None = None
        self.cumulative_logprob = 0.0
        self.text: list[str] = []
        self.logprobs: list[list[TokenLogprob]] = []
        self.num_tokens = 0
        self.news = False

    def add(self, output: Output) -> None:
        ids, reason = output.token_ids, output.finish_reason
        # A token that ends the text (EOS or of stop_token_ids) is counted, and is no part of it.
        silent = int(reason is FinishReason.STOP and self.drop_stop_token and bool(ids))
        before = self.detokenizer.num_tokens
        text = self.detokenizer.push(ids[: len(ids) - silent])
        if reason is not None:
            text += self.detokenizer.finish()
        count = len(ids)
        if self.detokenizer.stopped is not None:
            reason, count = FinishReason.STOP, self.detokenizer.num_tokens - before
        entries = output.logprobs or []
        self.num_tokens += count
        self.logprobs += entries[:count]
        # Tokens after a stop string were never asked for, so their share is taken out again.
        self.cumulative_logprob = output.cumulative_logprob - sum(entry[0].logprob for entry in entries[count:])
        self.finish_reason = reason
        self.text.append(text)
        self.news = self.news or bool(text) or reason is not None

    def take(self) -> tuple[str, list[list[TokenLogprob]], int]:
        taken = "".join(self.text), self.logprobs, self.num_tokens
        self.text, self.logprobs, self.num_tokens, self.news = [], [], 0, False
        return taken


class ResponseBuilder:
    """Owned by one thread, or guarded by its owner."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._streams = [_Stream(tokenizer, request.sampling) for _ in range(request.sampling.n)]
        self._answered = False
        self.num_output_tokens = 0
        """Tokens of all sequences so far, for metrics."""

    @property
    def finished(self) -> bool:
        """All n sequences have ended; once `take` has returned after that, nothing more will come."""
        return all(stream.finish_reason is not None for stream in self._streams)

    def add(self, output: Output) -> list[int]:
        """Takes in one output; late ones of an ended sequence are dropped.

        Returns the indices of sequences that just ended by a stop string, which the engine does not know of: the
        caller aborts them there.
        """
        stream = self._streams[output.index]
        if stream.finish_reason is not None:
            return []
        before = stream.num_tokens
        stream.add(output)
        self.num_output_tokens += stream.num_tokens - before
        return [output.index] if stream.finish_reason is not None and output.finish_reason is None else []

    def take(self) -> dict[str, np.ndarray] | None:
        """The next response's tensors by name, or None if there is nothing to send.

        Streaming: everything since the last response, once there is new text or an end (tokens whose text is still
        held back wait for the next response). Not streaming: everything, once, when all sequences have ended.
        """
        if self._answered:
            return None
        finished = self.finished
        ready = any(stream.news for stream in self._streams) if self._request.stream else finished
        if not ready:
            return None
        self._answered = finished
        return self._tensors()

    def _tensors(self) -> dict[str, np.ndarray]:
        request = self._request
        taken = [stream.take() for stream in self._streams]
        prompt = request.prompt_text if request.echo else ""
        tensors = {"text_output": _strings([prompt + text for text, _, _ in taken])}
        if request.return_finish_reason:
            reasons = [stream.finish_reason for stream in self._streams]
            tensors["finish_reason"] = _strings([RUNNING if reason is None else reason.value for reason in reasons])
        if request.return_cumulative_logprob:
            sums = [stream.cumulative_logprob for stream in self._streams]
            tensors["cumulative_logprob"] = np.array(sums, dtype=np.float32)
        if request.return_logprobs:
            tensors["logprobs"] = _strings([self._logprobs_json(logprobs) for _, logprobs, _ in taken])
        if request.return_num_input_tokens:
            tensors["num_input_tokens"] = np.array([len(request.prompt_token_ids)], dtype=np.uint32)
        if request.return_num_output_tokens:
            tensors["num_output_tokens"] = np.array([count for _, _, count in taken], dtype=np.uint32)
        return tensors

    def _logprobs_json(self, tokens: list[list[TokenLogprob]]) -> str:
        if not self._request.has_logprobs:
            return "null"
        return json.dumps(
            [
                {
                    str(entry.token_id): {
                        "logprob": max(entry.logprob, _LOWEST),
                        "rank": entry.rank,
                        "decoded_token": self._tokenizer.token_text(entry.token_id),
                    }
                    for entry in entries
                }
                for entries in tokens
            ]
        )


def _strings(values: list[str]) -> np.ndarray:
    """A BYTES tensor `[len(values)]` as pb_utils takes it."""
    return np.array([value.encode("utf-8") for value in values], dtype=np.object_)
