# SPDX-License-Identifier: Apache-2.0
"""What each sequence has said so far, counted on the device, since the host does not know the newest tokens yet.

Only sequences that ask for a penalty have a row here. A row is an int32 for each token of the vocabulary:
2 * (times in the output) + (1 if it is in the prompt). Rows live in one tensor, so that a step's rows are one gather.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from multilora_backend.core import Sequence
from multilora_backend.engine.staging import Copies

FIRST_ROWS = 8


@dataclass
class _Row:
    index: int
    counted: int
    """Output tokens that are in the row."""


class Penalties:
    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._said = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._rows: dict[Sequence, _Row] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def forget(self, sequence: Sequence) -> None:
        row = self._rows.pop(sequence, None)
        if row is not None:
            self._free.append(row.index)

    def widen(self, width: int) -> None:
        """Makes room for token ids below `width`, if there is none: an adapter may know more than the model."""
        missing = width - self._said.shape[1]
        if missing > 0:
            self._said = torch.nn.functional.pad(self._said, (0, missing))

    def rows_of(self, sequences: list[Sequence], copies: Copies) -> list[int]:
        """Each sequence's row, which holds all of its output. Makes rows that are missing from the token ids.

        Raises RuntimeError if such a sequence has a token that only the device knows.
        """
        missing = [s for s in sequences if not self._is_current(s)]
        for sequence in missing:
            if min(sequence.token_ids) < 0:
                raise RuntimeError(
                    f"sequence {sequence.key}: its output was not counted from the start, and its newest token is not "
                    "on the host: a penalty cannot be computed"
                )
        if missing:
            self._build(missing, copies)
        return [self._rows[s].index for s in sequences]

    def apply(self, logits: Tensor, rows: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
        """Penalised logits of the sequences in `rows` (int64 [R]): fp32 [R, vocab] in and out, penalties fp32 [R].

        repetition counts prompt and output (Keskar et al., CTRL, 2019); presence and frequency count the output only
        (OpenAI's definition: logit - count * frequency - (count > 0) * presence).
        """
        said = self._said.index_select(0, rows)[:, : logits.shape[1]]
        factor = torch.where(said > 0, repetition[:, None], 1.0)
        logits = torch.where(logits > 0, logits / factor, logits * factor)
        count = said >> 1
        return logits - (count * frequency[:, None] + (count > 0) * presence[:, None])

    def count(self, sequences: list[Sequence], rows: Tensor, tokens: Tensor) -> None:
        """Adds the tokens just drawn, [R] on the device, to the sequences' rows (int64 [R])."""
        vocab = self._said.shape[1]
        at = rows * vocab + tokens
        self._said.view(-1).index_add_(0, at, torch.full_like(at, 2, dtype=torch.int32))
        for sequence in sequences:
            self._rows[sequence].counted += 1

    def _is_current(self, sequence: Sequence) -> bool:
        row = self._rows.get(sequence)
        return row is not None and row.counted == sequence.num_output_tokens

    def _build(self, sequences: list[Sequence], copies: Copies) -> None:
        vocab = self._said.shape[1]
        places, values = [], []
        for sequence in sequences:
            if sequence not in self._rows:
                self._rows[sequence] = _Row(self._free_row(), 0)
            row = self._rows[sequence]
            row.counted = sequence.num_output_tokens
            tokens = np.array(sequence.token_ids, np.int64)
            said = np.zeros(vocab, np.int32)
            said[tokens[: sequence.prompt_len]] = 1
            output, counts = np.unique(tokens[sequence.prompt_len :], return_counts=True)
            said[output] += (2 * counts).astype(np.int32)
            place = np.flatnonzero(said)
            places.append(place + row.index * vocab)
            values.append(said[place])
        rows = np.array([self._rows[s].index for s in sequences], np.int64)
        new = copies.upload({"rows": rows, "places": np.concatenate(places), "values": np.concatenate(values)})
        self._said.index_fill_(0, new["rows"], 0)
        self._said.view(-1).index_copy_(0, new["places"], new["values"])

    def _free_row(self) -> int:
        if not self._free:
            old = self._said
            said = old.new_zeros(max(FIRST_ROWS, 2 * len(old)), old.shape[1])
            said[: len(old)].copy_(old)
            self._said = said  # only now: if the copy fails, that is the new sequences' failure and not the others'
            self._free = list(range(len(old), len(said)))
        return self._free.pop()
