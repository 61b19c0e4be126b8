# SPDX-License-Identifier: Apache-2.0
"""What rope_write takes, with a cache that shows every write that is out of place, and its error in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from multilora_kernels import Delta

EPS = 1e-5
PAGE_SIZE = 4
UNTOUCHED = 7.0
NORMS = {"no-norm": None, "qwen-norm": False, "gemma-norm": True}


@dataclass
class Setup:
    """All arguments but qkv and delta. The cache is the middle one of three in a storage; most slots are free."""

    heads: int
    kv_heads: int
    cos: torch.Tensor
    sin: torch.Tensor
    storage: torch.Tensor
    slots: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    gemma: bool

    @property
    def kv_cache(self) -> torch.Tensor:
        return self.storage[:, 1]

    @property
    def widths(self) -> tuple[int, int, int]:
        d = self.storage.shape[5]
        return self.heads * d, self.kv_heads * d, self.kv_heads * d

    def run(self, op, qkv: torch.Tensor, delta: Delta | None = None, out: torch.Tensor | None = None):
        """(q, the storage after it)."""
        storage = self.storage.clone()
        norms = (self.q_norm, self.k_norm, EPS, self.gemma)
        q = op(qkv, self.cos, self.sin, storage[:, 1], self.slots, self.heads, self.kv_heads, *norms, delta, out)
        return q, storage

    def written(self, storage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the step's tokens, [T, kv_heads, D] each; everything else must be untouched."""
        storage = storage.clone()
        pages, offsets = self.slots.long() // PAGE_SIZE, self.slots.long() % PAGE_SIZE
        k, v = (storage[pages, 1, which, offsets] for which in (0, 1))
        storage[pages, 1, :, offsets] = UNTOUCHED
        assert (storage == UNTOUCHED).all(), "slots of other tokens"
        return k, v


def make_setup(rows: int, heads: int, kv_heads: int, d: int, rotary: int, gemma: bool | None, target) -> Setup:
    generator = torch.Generator().manual_seed(rows * d)
    # Models have the same angles in both halves; here none are alike, so that no column can stand for another.
    angles = (torch.arange(rows)[:, None] * 37 % 1000) / 10000 ** (torch.arange(rotary) / rotary)
    pages = 3 * rows // PAGE_SIZE + 2
    storage = torch.full((pages, 3, 2, PAGE_SIZE, kv_heads, d), UNTOUCHED)
    slots = torch.randperm(pages * PAGE_SIZE, generator=generator)[:rows].int()
    norms = [None if gemma is None else 1 + 0.3 * torch.randn(d, generator=generator) for _ in range(2)]
    q_norm, k_norm = (norm if norm is None else norm.to(target.device, target.dtype) for norm in norms)
    cos, sin, storage = (t.to(target.device, target.dtype) for t in (angles.cos(), angles.sin(), storage))
    return Setup(heads, kv_heads, cos, sin, storage, slots.to(target.device), q_norm, k_norm, bool(gemma))


def make_qkv(setup: Setup) -> torch.Tensor:
    """Columns of a wider buffer with NaN on both sides."""
    n = sum(setup.widths)
    wide = torch.full((len(setup.cos), n + 27), torch.nan, dtype=setup.cos.dtype, device=setup.cos.device)
    wide[:, 16 : 16 + n] = torch.randn(len(setup.cos), n, generator=torch.Generator().manual_seed(n))
    return wide[:, 16 : 16 + n]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """For comparisons that tell -0.0 from 0.0."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def check_against_fp64(setup: Setup, q, storage, qkv: torch.Tensor, qkv_error: torch.Tensor) -> None:
    """Each rounding of the model's arithmetic, carried through to the end, from qkv and its own error in float64.

    A rounding is at most half an eps; products of errors are covered by counting whole ones.
    """
    fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(q.dtype).eps
    tiny = torch.finfo(q.dtype).tiny * rounding
    d, rotary = q.shape[2], setup.cos.shape[1]
    values, errors = (part.double().unflatten(1, (-1, d)) for part in (qkv, qkv_error))
    heads = [setup.heads, setup.kv_heads, setup.kv_heads]
    parts = list(zip(values.split(heads, dim=1), errors.split(heads, dim=1), strict=True))
    for i, weight in enumerate((setup.q_norm, setup.k_norm)):
        value, error = parts[i]
        if weight is not None:
            scale = 1 + weight.double() if setup.gemma else weight.double()
            squares = value.square().sum(-1, keepdim=True)
            inverse_rms = torch.rsqrt(squares / d + EPS)
            relative = (value.abs() * error).sum(-1, keepdim=True) / squares.clamp_min(d * EPS) + (d / 2 + 6) * fp32
            error = (scale * inverse_rms).abs() * (error + value.abs() * (relative + 2 * rounding)) + tiny
            value = value * inverse_rms * scale
        cos, sin = setup.cos.double()[:, None], setup.sin.double()[:, None]
        turning, turning_error = value[..., :rotary], error[..., :rotary]
        (low, high), (low_error, high_error) = turning.chunk(2, dim=-1), turning_error.chunk(2, dim=-1)
        products = turning * cos, torch.cat([-high, low], dim=-1) * sin
        carried = turning_error * cos.abs() + torch.cat([high_error, low_error], dim=-1) * sin.abs()
        rounded = 1.5 * rounding * (products[0].abs() + products[1].abs()) + 3 * tiny
        value = torch.cat([products[0] + products[1], value[..., rotary:]], dim=-1)
        error = torch.cat([carried + rounded, error[..., rotary:]], dim=-1)
        parts[i] = value, error
    for actual, (value, error) in zip((q, *setup.written(storage)), parts, strict=True):
        assert actual.shape == value.shape
        assert ((actual.double() - value).abs() <= error).all()
