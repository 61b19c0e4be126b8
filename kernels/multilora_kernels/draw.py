# SPDX-License-Identifier: Apache-2.0
"""One token a row: argmax of logit / temperature + Gumbel noise, which draws token i with probability softmax(.)_i.

The noise of a token is a function of (seed, index, token id) and of nothing else: Philox 4x32-10 (Salmon et al., SC
2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed as its key and (token id // 4, index, 0, 0) as its
counter; word token id % 4 of the result is the token's. So neither the batch nor the launch grid nor the device can
change what a seed draws; only the rounding of logits and logarithms differs between a CPU and a GPU.

Where no row of a batch draws, `draw_greedy` takes the argmax by the same kernels, without noise and its parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multilora_kernels._triton import jit, row_stride, tl, triton, use_kernel

# Ten Philox rounds for four tokens are about 30 integer instructions a token, more than the memory needs for a bf16
# logit: 132 us for 256 x 128,256 (H200, 2026-11-27). 1,024 to 8,192 tokens and 4 warps are at best 4% better.
BLOCK = 4096
NUM_WARPS = 8
# Without noise only the memory counts: 26 us for 256 x 128,256 bf16, where torch's argmax takes 49, and 4 for a row
# (H200, 2026-11-27). 4,096 to 16,384 tokens and 2 to 8 warps are within 20%, 16 warps and 2,048 tokens up to twice as
# slow.
GREEDY_BLOCK = 8192
GREEDY_NUM_WARPS = 8

LEAST_PARTS = 128
"""Lanes for the parts of a row: enough for 524,288 tokens. Rows that are longer by an adapter's own tokens then take no
other kernel."""

SMALL_W = 1 / 64
"""Below it -log(1 - w) is its Taylor series, since 1 - w would lose the bits that decide who wins."""


@jit
def philox_words(seed, index, group):
    """The four uint32 words of the token groups `group` (uint32 block), for scalars seed (int64) and index (int32)."""
    zero = group * 0
    return tl.philox(seed, group, zero + index.to(tl.uint32), zero, zero)


@jit
def _gumbel(bits):
    # w is uniform in (0, 1); the smallest w give the largest noise, and floats are densest there: no ties at the top.
    w = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = w * (1.0 + w * (0.5 + w * (0.3333333333333333 + w * 0.25)))
    return -tl.log(tl.where(w < 0.015625, series, -tl.log(1.0 - w)))


@jit(do_not_specialize=["parts"])  # it follows the width of a row in steps that no warm-up knows
def _draw_kernel(
    logits, temperature, seed, index, floor, last, best, best_token,
    stride, vocab, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(1), tl.program_id(0)
    token = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    if floor is not None:
        row_floor, row_last = tl.load(floor + row), tl.load(last + row)
        x = tl.where((x > row_floor) | ((x == row_floor) & (token <= row_last)), x, float("-inf"))
    if temperature is not None:
        t = tl.load(temperature + row)
        if t > 0:
            group = part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            w0, w1, w2, w3 = philox_words(tl.load(seed + row), tl.load(index + row), group.to(tl.uint32))
            bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
            x = x / t + _gumbel(bits)
    value, at = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * parts + part, value)
    tl.store(best_token + row * parts + part, part * BLOCK + at)


@jit(do_not_specialize=["parts"])
def _pick_kernel(best, best_token, out, parts, PARTS: tl.constexpr):
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    values = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    _, at = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out + row, tl.load(best_token + row * parts + at))


def _launch(
    logits: Tensor,
    temperature: Tensor | None,
    seed: Tensor | None,
    index: Tensor | None,
    kept: tuple[Tensor, Tensor] | None,
    block: int,
    num_warps: int,
) -> Tensor:
    stride = row_stride("draw", "logits", logits, logits.dtype)
    batch, vocab = logits.shape
    out = torch.empty(batch, dtype=torch.int32, device=logits.device)
    if batch == 0:
        return out
    parts = triton.cdiv(vocab, block)
    best = torch.empty(batch, parts, dtype=torch.float32, device=logits.device)
    best_token = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    floor, last = kept if kept is not None else (None, None)
    _draw_kernel[(parts, batch)](
        logits, temperature, seed, index, floor, last, best, best_token,
        stride, vocab, parts,
        BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    lanes = max(triton.next_power_of_2(parts), LEAST_PARTS)
    _pick_kernel[(batch,)](best, best_token, out, parts, PARTS=lanes, num_warps=1)
    return out


def draw(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    index: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The drawn token ids, int32 [B]. Deterministic; of equal values the lowest id wins, NaN counts as -inf.

    Args:
        logits: [B, V] of any float dtype; rows may be strided.
        temperature: fp32 [B]; 0 takes the row's argmax and uses no noise.
        seed: int64 [B], all 64 bits of each row's seed.
        index: int32 [B], which token of its sequence the row draws: every index has its own noise.
        kept: (floor fp32 [B], last int32 [B]) from `truncate`: only logits above floor, and those equal to it with a
            token id up to last, can be drawn.

    Raises:
        ValueError: rows of the logits are not dense, on a device where kernels run.
    """
    if not use_kernel(logits):
        return draw_reference(logits, temperature, seed, index, kept)
    return _launch(logits, temperature, seed, index, kept, BLOCK, NUM_WARPS)


def draw_greedy(logits: Tensor) -> Tensor:
    """What `draw` gives where every temperature is 0: int32 [B], the same ids for equal values and for NaN.

    Args:
        logits: [B, V] of any float dtype; rows may be strided.

    Raises:
        ValueError: as of `draw`.
    """
    if not use_kernel(logits):
        return draw_greedy_reference(logits)
    return _launch(logits, None, None, None, None, GREEDY_BLOCK, GREEDY_NUM_WARPS)


def draw_greedy_reference(logits: Tensor) -> Tensor:
    """What draw_greedy computes, in torch, whose argmax alone would take NaN for the largest value."""
    return logits.masked_fill(logits.isnan(), -torch.inf).argmax(-1).to(torch.int32)


def draw_reference(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    index: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What draw computes, in torch, with the same random bits."""
    x = logits.float()
    x = x.masked_fill(x.isnan(), -torch.inf)
    if kept is not None:
        floor, last = kept[0][:, None], kept[1][:, None]
        token = torch.arange(x.shape[1], device=x.device)
        x = x.masked_fill(~((x > floor) | ((x == floor) & (token <= last))), -torch.inf)
    random = (temperature > 0).nonzero()[:, 0]
    if random.numel():
        noise = gumbel_reference(random_bits(seed[random], index[random], x.shape[1]))
        x = x.index_copy(0, random, x[random] / temperature[random, None] + noise)
    return x.argmax(-1).to(torch.int32)


def random_bits(seed: Tensor, index: Tensor, vocab: int) -> Tensor:
    """Each token's 32 random bits, int64 [B, vocab] in [0, 2**32), for seed int64 [B] and index int32 [B]."""
    low = 0xFFFFFFFF
    zero = torch.zeros(len(seed), -(-vocab // 4), dtype=torch.int64, device=seed.device)
    c0 = zero + torch.arange(zero.shape[1], device=seed.device)
    c1, c2, c3 = zero + (index.to(torch.int64) & low)[:, None], zero, zero
    k0, k1 = (seed & low)[:, None], ((seed >> 32) & low)[:, None]
    for _ in range(10):
        # A product of two 32-bit words has the right 64 bits even where int64 calls them negative.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product2 >> 32) & low ^ c1 ^ k0, product2 & low
        c2, c3 = (product0 >> 32) & low ^ c3 ^ k1, product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :vocab]


def gumbel_reference(bits: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32, from 32 random bits each."""
    w = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = w * (1.0 + w * (0.5 + w * (1 / 3 + w * 0.25)))
    return -torch.where(w < SMALL_W, series, -torch.log(1.0 - w)).log()
