# SPDX-License-Identifier: Apache-2.0
"""Greedy rows without noise: the likeliest token of each, and the lowest id where several are."""

from __future__ import annotations

import pytest
import torch

from multilora_kernels import draw as module
from multilora_kernels.draw import draw, draw_greedy, draw_greedy_reference

VOCABS = [1, 61, 4096, 4097, 9001, 128_256]
"""One token, less than a block, a block, one more, odd, and that of Llama 3."""


def logits_of(vocab: int, target, rows: int = 5) -> torch.Tensor:
    """Rows with ties, farther apart than they are long: whoever reads on finds the largest value of all."""
    storage = torch.full((rows, vocab + 13), torch.inf)
    storage[:, :vocab] = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 4).round() / 2
    return storage.to(target.device, target.dtype)[:, :vocab]


def by_definition(logits: torch.Tensor) -> list[int]:
    rows = [[value if value == value else -torch.inf for value in row] for row in logits.tolist()]
    return [row.index(max(row)) for row in rows]


def edges(target, vocab: int = VOCABS[4]) -> tuple[torch.Tensor, list[int]]:
    """Rows where an argmax goes wrong, and what is right."""
    rows = torch.zeros(9, vocab)
    rows[0, [8000, 5000, 8999]] = 3.0
    rows[1] = torch.nan
    rows[2] = -torch.inf
    rows[3, [0, 4096, 7000]] = torch.nan
    rows[3, 4097] = 1.0
    rows[4, :-1] = torch.nan
    rows[4, -1] = -1.0
    rows[5, [8, 8500]] = torch.inf
    rows[6] = -0.0
    rows[6, 6000] = 0.0
    rows[7] = -5.0
    rows[7, [4095, 4096]] = -4.0
    rows[8, :8192] = -torch.inf
    rows[8, 8192:] = -3.0
    return rows.to(target.device, target.dtype), [5000, 0, 0, 4097, vocab - 1, 8, 0, 4095, 8192]


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_kernel_takes_what_the_reference_takes(target, vocab):
    logits = logits_of(vocab, target, rows=2 if vocab > 10_000 else 5)
    drawn = draw_greedy(logits)
    assert drawn.dtype == torch.int32
    assert torch.equal(drawn, draw_greedy_reference(logits))
    assert torch.equal(draw_greedy(logits[1:2]), drawn[1:2]), "alone or in company"
    zero = torch.zeros(len(logits), device=target.device)
    assert torch.equal(draw(logits, zero, zero.long(), zero.int()), drawn), "as greedy rows among rows that draw"


@pytest.mark.parametrize("vocab", VOCABS[:4])
def test_the_reference_is_the_definition(reference_target, vocab):
    logits = logits_of(vocab, reference_target)
    assert draw_greedy_reference(logits).tolist() == by_definition(logits)


def test_the_reference_at_the_edges(reference_target):
    logits, expected = edges(reference_target)
    assert by_definition(logits) == expected
    assert draw_greedy_reference(logits).tolist() == expected


@pytest.mark.parametrize("block", [None, 256, 16384], ids=["", "many-parts", "one-part"])
def test_equal_logits_go_to_the_lowest_id_and_nan_to_nobody(target, monkeypatch, block):
    if block is not None:  # whatever a GPU likes best
        monkeypatch.setattr(module, "GREEDY_BLOCK", block)
    logits, expected = edges(target)
    assert draw_greedy(logits).tolist() == expected


def test_no_rows(target):
    assert draw_greedy(torch.zeros(0, 10, dtype=target.dtype, device=target.device)).shape == (0,)


def test_rows_that_are_not_dense_are_refused(one_target):
    logits = torch.zeros(4, 6, dtype=one_target.dtype, device=one_target.device)[:, ::2]
    zero = torch.zeros(4, device=one_target.device)
    with pytest.raises(ValueError, match="draw: logits must be dense in its last dimension"):
        draw_greedy(logits)
    with pytest.raises(ValueError, match="draw: logits must be dense"):
        draw(logits, zero, zero.long(), zero.int())
