# SPDX-License-Identifier: Apache-2.0
"""The decoder layer that takes the place of transformers' own: same weights, same arithmetic, few launches.

A layer is four GEMMs and, between them, add + norm, rope + KV write, attention, and the gated activation; LoRA of
q/k/v and gate/up is added inside rope and activation. Each layer ends with the *next* layer's input norm, fused with
the residual add, so hidden states travel between layers already normed and the residual stream in the step's context.
`models.loader` compares the result with transformers' own layers at every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from multilora_backend.models import context
from multilora_backend.models.linear import FusedLinear
from multilora_kernels import add_rmsnorm, gated_activation, rope_write


class Norm(nn.Module):
    """RMSNorm of a transformers module: its weight, epsilon and rounding (Gemma multiplies before it rounds)."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.weight = module.weight
        self.eps = float(module.eps if hasattr(module, "eps") else module.variance_epsilon)
        self.gemma = "Gemma" in type(module).__name__
        self.name: str = module.full_name
        """In transformers' model: adapters may have weights of their own for it."""

    def forward(self, x: Tensor, residual: Tensor | None = None, inner: Norm | None = None) -> Tensor:
        """Norm of x; with a residual, of residual + x, which is left in `residual`. `inner` norms x first."""
        groups = context.current().lora.extras.weights(self.name, self.name if inner is None else inner.name)
        if groups is None:
            return add_rmsnorm(x, residual, self.weight, self.eps, self.gemma, None if inner is None else inner.weight)
        out = x.new_empty(x.shape)
        for rows, (weight, inner_weight) in groups:
            weight = self.weight if weight is None else weight
            if inner is None:
                inner_weight = None
            elif inner_weight is None:
                inner_weight = inner.weight
            own = None if residual is None else residual[rows]
            out[rows] = add_rmsnorm(x[rows], own, weight, self.eps, self.gemma, inner_weight)
            if residual is not None and own is not None:
                residual[rows] = own
        return out


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer's attention computes; layers with equal specs share a plan."""

    scale: float
    window: int | None = None
    """A row sees the last `window` positions, itself included; None: all."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) (Gemma 2)."""


class Attention(nn.Module):
    """qkv GEMM, rope and KV write, paged attention, o GEMM. `kv_cache` is attached by `models.loader`."""

    kv_cache: Tensor
    """[pages, 2, page_size, kv_heads, head_dim]"""

    def __init__(self, module: Any, qkv: FusedLinear, o: FusedLinear) -> None:
        super().__init__()
        config = module.config
        self.qkv_proj, self.o_proj = qkv, o
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = module.head_dim
        # Mistral and Phi-3 have the window in the config, the others, by layer, on the module.
        window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None)
        self.spec = AttentionSpec(float(module.scaling), window, getattr(module, "attn_logit_softcapping", None))
        self.q_norm = Norm(module.q_norm) if hasattr(module, "q_norm") else None
        self.k_norm = Norm(module.k_norm) if hasattr(module, "k_norm") else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x `[T, hidden]`, cos and sin `[T, rotary width]` -> `[T, hidden]`."""
        step = context.current()
        groups = None
        if self.q_norm is not None and self.k_norm is not None:
            groups = step.lora.extras.weights(self.q_norm.name, self.k_norm.name)
        if self.qkv_proj.slices == 3 and groups is None:
            qkv, delta = self.qkv_proj(x)
        else:  # one module for all three (Phi-3): its LoRA knows no q, k and v
            qkv, delta = self.qkv_proj.complete(x), None
        if groups is None:
            q = self._rope_write(qkv, cos, sin, step.write_slots, (None, None), delta=delta, out=step.query)
        else:
            q = x.new_empty(len(x), self.num_heads, self.head_dim) if step.query is None else step.query
            for rows, weights in groups:
                q[rows] = self._rope_write(qkv[rows], cos[rows], sin[rows], step.write_slots[rows], weights)
        out = step.attention.run(self.kv_cache, q, self.spec)
        return self.o_proj.complete(out.view(-1, self.num_heads * self.head_dim))

    def _rope_write(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, norms: Sequence[Tensor | None], **more: Any
    ) -> Tensor:
        """`norms`: weights for q's and k's in place of the model's."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = norms
            more |= {"q_norm": self.q_norm.weight if q is None else q, "eps": self.q_norm.eps}
            more |= {"k_norm": self.k_norm.weight if k is None else k, "gemma": self.q_norm.gemma}
        return rope_write(qkv, cos, sin, self.kv_cache, slots, self.num_heads, self.num_kv_heads, **more)


class GatedMlp(nn.Module):
    """gate/up GEMM, activation, down GEMM."""

    def __init__(self, kind: str, gate_up: FusedLinear, down: FusedLinear) -> None:
        super().__init__()
        self.kind = kind
        self.gate_up_proj, self.down_proj = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj.slices == 2:
            gate_up, delta = self.gate_up_proj(x)
        else:
            gate_up, delta = self.gate_up_proj.complete(x), None
        return self.down_proj.complete(gated_activation(gate_up, self.kind, delta))


class DecoderLayer(nn.Module):
    """Called by transformers' model in place of its own layer, with hidden states `(1, T, hidden)`."""

    def __init__(self, module: Any, attention: Attention, mlp: nn.Module, next_norm: Any, first: bool) -> None:
        """`next_norm` is the norm that follows this layer: the next layer's first, or the model's last."""
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_norm = Norm(module.input_layernorm) if first else None
        self.next_norm = Norm(next_norm)
        # Gemma 2 and 3 norm what a block adds as well as what it reads.
        sandwich = hasattr(module, "pre_feedforward_layernorm")
        self.mlp_norm = Norm(module.pre_feedforward_layernorm if sandwich else module.post_attention_layernorm)
        self.attention_out_norm = Norm(module.post_attention_layernorm) if sandwich else None
        self.mlp_out_norm = Norm(module.post_feedforward_layernorm) if sandwich else None
        # Granite scales what a block adds.
        self.residual_multiplier = float(getattr(module, "residual_multiplier", 1.0))

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        """Residual stream in the context, normed hidden states in and out."""
        step = context.current()
        x = hidden_states[0]
        cos, sin = position_embeddings[0][0], position_embeddings[1][0]
        if self.input_norm is not None:
            step.residual = x  # fresh from the embedding: nobody else reads it
            x = self.input_norm(x)
        x = self.mlp_norm(self._scaled(self.self_attn(x, cos, sin)), step.residual, self.attention_out_norm)
        return self.next_norm(self._scaled(self.mlp(x)), step.residual, self.mlp_out_norm)[None]

    def _scaled(self, y: Tensor) -> Tensor:
        # In place, and rounded before the residual is added, as transformers does it.
        return y if self.residual_multiplier == 1.0 else y.mul_(self.residual_multiplier)
