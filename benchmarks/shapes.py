# SPDX-License-Identifier: Apache-2.0
"""The shapes of real models, and what a benchmark measures at them: `multilora` needs nothing else of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A dense decoder of the Llama family; the names are transformers'."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    model_type: str = "llama"
    tie_word_embeddings: bool = False
    rope_theta: float = 500_000.0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The seven linears of a layer: name -> (in, out) features."""
        hidden, inner = self.hidden_size, self.intermediate_size
        heads, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (hidden, heads),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (heads, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }

    @property
    def bytes_per_rank(self) -> int:
        """Of an adapter on all seven linears, in bf16; ranks lie in pages of 8."""
        return 2 * self.num_hidden_layers * sum(k + n for k, n in self.linears.values())

    @property
    def config(self) -> dict[str, Any]:
        """config.json as transformers 5 reads it. Context is 8,192 tokens: the real one would only grow tables."""
        return {
            "model_type": self.model_type,
            "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.model_type]],
            "dtype": "bfloat16",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": 8192,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def layer(self, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of a layer's tensors."""
        prefix = f"model.layers.{index}"
        for name, (k, n) in self.linears.items():
            yield f"{prefix}.{name}.weight", (n, k)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (self.hidden_size,)
        if self.model_type == "qwen3":  # normalises each head's q and k
            for name in ("q_norm", "k_norm"):
                yield f"{prefix}.self_attn.{name}.weight", (self.head_dim,)

    def ends(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """What lies before and behind the layers."""
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size)
        yield "model.norm.weight", (self.hidden_size,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, self.hidden_size)


SHAPES = {
    # For the CPU, where a script's own tests take seconds with them.
    "tiny": Shape(64, 160, 2, 4, 2, 16, 512),
    "tiny-qwen3": Shape(64, 160, 2, 4, 2, 24, 512, model_type="qwen3", rope_theta=1e6),
    # A quick check on CUDA: the smallest head that FlashInfer takes.
    "tiny-gpu": Shape(512, 1536, 4, 8, 2, 64, 8192),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128_256, tie_word_embeddings=True),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128_256),
    "qwen3-14b": Shape(5120, 17408, 40, 40, 8, 128, 151_936, model_type="qwen3", rope_theta=1e6),
}
