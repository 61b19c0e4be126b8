# SPDX-License-Identifier: Apache-2.0
"""top_k, top_p and min_p without sorting: for each row the smallest logit that stays.

What stays is a prefix of the row sorted by (logit, then lowest id first), so two numbers describe it: the prefix's
last logit and, because bf16 logits tie all the time, that token's id. The logit is found by bisection over the row's
values. All sums have a fixed order and nothing is atomic: a row keeps the same tokens in any batch, and exactly k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multilora_kernels._triton import jit, tl, use_kernel

# Not tuned on a GPU yet. One program reads its row about twice log2(vocab) times, out of L2.
BLOCK = 4096
NUM_WARPS = 16


@jit
def _logits(row, vocab, token):
    x = tl.load(row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@jit
def _range(row, vocab, BLOCK: tl.constexpr):
    """(how many logits are finite, the smallest of those, the largest)."""
    count = tl.zeros((BLOCK,), tl.int32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        x = _logits(row, vocab, start + tl.arange(0, BLOCK))
        count += (x > float("-inf")).to(tl.int32)
        low = tl.where(x > float("-inf"), tl.minimum(low, x), low)
        top = tl.maximum(top, x)
    return tl.sum(count), tl.min(low), tl.max(top)


@jit
def _survey(row, vocab, at, top, t, BLOCK: tl.constexpr, MASS: tl.constexpr):
    """(logits >= at: how many, their mass, the smallest; the largest logit < at). Mass is exp((x - top) / t)."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    above = tl.full((BLOCK,), float("inf"), tl.float32)
    below = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        x = _logits(row, vocab, start + tl.arange(0, BLOCK))
        inside = x >= at
        count += inside.to(tl.int32)
        if MASS:
            mass += tl.where(inside, tl.exp((x - top) / t), 0.0)
        above = tl.where(inside, tl.minimum(above, x), above)
        below = tl.where(inside, below, tl.maximum(below, x))
    return tl.sum(count), tl.sum(mass), tl.min(above), tl.max(below)


@jit
def _tail(row, vocab, at, top, t, BLOCK: tl.constexpr):
    """(how many logits > at, their mass)."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        x = _logits(row, vocab, start + tl.arange(0, BLOCK))
        count += (x > at).to(tl.int32)
        mass += tl.where(x > at, tl.exp((x - top) / t), 0.0)
    return tl.sum(count), tl.sum(mass)


@jit
def _between(low, high):
    """A number in (low, high], halfway if there is one."""
    middle = 0.5 * low + 0.5 * high
    return tl.where((middle > low) & (middle < high), middle, high)


@jit
def _truncate_kernel(logits, temperature, top_k, top_p, min_p, floor, last, stride, vocab, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    t, k, p, ratio = (
        tl.load(temperature + index),
        tl.load(top_k + index),
        tl.load(top_p + index),
        tl.load(min_p + index),
    )
    row_floor, row_last = float("-inf"), vocab
    if (t > 0) & ((k > 0) | (p < 1) | (ratio > 0)):
        finite, low, top = _range(row, vocab, BLOCK)
        ties = vocab  # how many of the tokens whose logit is `low` stay
        if (k > 0) & (k < finite):
            high = top
            while low < high:
                middle = _between(low, high)
                count, mass, above, below = _survey(row, vocab, middle, top, t, BLOCK, False)
                enough = count >= k
                low = tl.where(enough, above, low)
                high = tl.where(enough, high, below)
            count, mass = _tail(row, vocab, low, top, t, BLOCK)
            ties = k - count
        if p < 1:
            count, mass, above, below = _survey(row, vocab, low, top, t, BLOCK, False)
            beyond, mass = _tail(row, vocab, low, top, t, BLOCK)
            ties = tl.minimum(ties, count - beyond)
            target = p * (mass + ties * tl.exp((low - top) / t))
            k_floor, high = low, top
            while low < high:
                middle = _between(low, high)
                count, mass, above, below = _survey(row, vocab, middle, top, t, BLOCK, True)
                enough = mass >= target
                low = tl.where(enough, above, low)
                high = tl.where(enough, high, below)
            beyond, mass = _tail(row, vocab, low, top, t, BLOCK)
            needed = tl.ceil((target - mass) / tl.exp((low - top) / t))
            needed = tl.maximum(tl.minimum(needed, vocab), 1.0).to(tl.int32)
            ties = tl.where(low == k_floor, tl.minimum(ties, needed), needed)
        row_floor = low
        seen = 0
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            tie = (_logits(row, vocab, token) == low).to(tl.int32)
            nth = seen + tl.cumsum(tie, axis=0)
            row_last = tl.minimum(row_last, tl.min(tl.where((tie > 0) & (nth == ties), token, vocab)))
            seen += tl.sum(tie)
        if ratio > 0:
            least = top + t * tl.log(ratio)
            row_last = tl.where(least > low, vocab, row_last)
            row_floor = tl.maximum(least, low)
    tl.store(floor + index, row_floor)
    tl.store(last + index, row_last)


def truncate(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """What top_k, then top_p of what is left, and min_p keep of each row; the likeliest token always stays.

    Args:
        logits: [B, V] of any float dtype; rows may be strided.
        temperature: fp32 [B]; rows at 0 keep everything.
        top_k: int32 [B], 0 for all. top_p: fp32 [B], 1 for all. min_p: fp32 [B], 0 for all.

    Returns (floor fp32 [B], last int32 [B]): a token stays if its logit is above floor, or equal to it and the token's
    id at most last.
    """
    if not use_kernel(logits):
        return truncate_reference(logits, temperature, top_k, top_p, min_p)
    batch, vocab = logits.shape
    floor = torch.empty(batch, dtype=torch.float32, device=logits.device)
    last = torch.empty(batch, dtype=torch.int32, device=logits.device)
    if batch:
        _truncate_kernel[(batch,)](
            logits, temperature, top_k, top_p, min_p, floor, last,
            logits.stride(0), vocab,
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return floor, last


def truncate_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """What truncate computes, by sorting, in torch."""
    batch, vocab = logits.shape
    floor = torch.full((batch,), -torch.inf, device=logits.device)
    last = torch.full((batch,), vocab, dtype=torch.int32, device=logits.device)
    rows = ((temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))).nonzero()[:, 0]
    x = logits[rows].float()
    ordered, index = x.masked_fill(x.isnan(), -torch.inf).sort(dim=-1, descending=True, stable=True)
    scaled = ordered / temperature[rows, None]
    place = torch.arange(vocab, device=logits.device)
    stays = (place < top_k[rows, None]) | (top_k[rows, None] <= 0)
    probs = scaled.masked_fill(~stays, -torch.inf).softmax(-1)
    # Without top_p >= 1 a cumulative sum that rounds to 1.0 early would cut the tail.
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    stays &= (before < top_p[rows, None]) | (top_p[rows, None] >= 1)
    stays &= probs >= probs[:, :1] * min_p[rows, None]
    least = (stays.sum(-1) - 1).clamp(min=0)[:, None]
    floor[rows] = ordered.gather(1, least)[:, 0]
    last[rows] = index.gather(1, least)[:, 0].to(torch.int32)
    return floor, last
