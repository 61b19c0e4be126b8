# SPDX-License-Identifier: Apache-2.0
"""Our ragged, paged, fused forward pass gives transformers' own logits, for each supported family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from multilora_backend.config import Config
from multilora_backend.core import Slot
from multilora_backend.errors import MultiloraError
from multilora_backend.models import fusion
from multilora_backend.models.layers import Attention, DecoderLayer
from multilora_backend.models.linear import FusedLinear
from multilora_backend.models.loader import attach_kv_cache, load_model, model_card
from ragged_steps import PAGE, logits_of_step, sequence

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
FAMILIES = {
    "llama": {},
    "llama3-rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 6,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"pad_token_id": 0, "sliding_window": 9},
    "phi3-partial": {
        "model_type": "phi3",
        "pad_token_id": 0,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.6,
        "logits_scaling": 1.7,
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7, "output_router_logits": True},
    "qwen3_moe": {"head_dim": 8, "moe_intermediate_size": 20, "num_experts": 7, "num_experts_per_tok": 3},
    "qwen3_moe-normalised": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}


def save(tmp_path: Path, family: str, **more) -> Path:
    settings = {**COMMON, **FAMILIES[family], **more}
    config = AutoConfig.for_model(settings.pop("model_type", family), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # norms at 1 and biases at 0 would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_decodes_in_one_ragged_batch(tmp_path: Path, family: str):
    folder = save(tmp_path, family)
    model = load_model(Config(model=str(folder), device="cpu", block_size=PAGE))
    for cache in attach_kv_cache(model.module, 20, PAGE, model.device):
        cache.fill_(torch.nan)  # whatever lies in pages before they are written must not matter
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (17, 9, 1)]
    pages = [[3, 9, 1, 14, 5], [2, 8, 4], [7]]
    sequences = [sequence(i, t, p) for i, (t, p) in enumerate(zip(tokens, pages, strict=True))]
    spans = [  # (sequence, start, count) of each step: chunks that cut pages, decodes beside chunks
        [(0, 0, 6), (1, 0, 8)],
        [(1, 8, 1), (0, 6, 10), (2, 0, 1)],
        [(0, 16, 1)],
    ]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = [reference(input_ids=torch.tensor([t])).logits[0] for t in tokens]
    for step in spans:
        got = logits_of_step(model, [Slot(sequences[i], start, count, True) for i, start, count in step])
        rows = torch.cat([expected[i][start : start + count] for i, start, count in step])
        # fp32; the longest dot product has K = 40 terms and two layers: a few tens of ulps of the largest logit
        assert (got - rows).abs().max() <= 64 * torch.finfo(torch.float32).eps * rows.abs().max()


def test_fusing_makes_four_sites_a_layer(tmp_path: Path):
    model = load_model(Config(model=str(save(tmp_path, "llama")), device="cpu"))
    assert [s.key for s in model.sites[:4]] == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    qkv = model.sites[0]
    assert qkv.out_features == (24, 12, 12)
    assert qkv.modules[1] == "model.layers.0.self_attn.k_proj"
    fused = [m for m in model.module.modules() if isinstance(m, FusedLinear)]
    assert [f.index for f in sorted(fused, key=lambda f: f.index)] == list(range(8))


@pytest.mark.parametrize("wrong", ["activation", "scale", "order", "residual"])
def test_layers_that_compute_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str):
    """What the probe is for: arithmetic that is not transformers' own must not go unnoticed."""
    folder = save(tmp_path, "llama")
    load_model(Config(model=str(folder), device="cpu"))
    if wrong == "activation":
        monkeypatch.setitem(fusion.ACTIVATIONS, "silu", "gelu_tanh")
    elif wrong == "scale":
        original = Attention.__init__

        def init(self, module, qkv, o):
            module.scaling *= 2
            original(self, module, qkv, o)

        monkeypatch.setattr(Attention, "__init__", init)
    elif wrong == "residual":
        monkeypatch.setattr(DecoderLayer, "_scaled", lambda _, y: y * 0.5)
    else:
        original_linear = fusion._linear

        def linear(parent, path, names, fused, sites):
            return original_linear(parent, path, names[::-1], fused, sites)

        monkeypatch.setattr(fusion, "_linear", linear)
    with pytest.raises(MultiloraError, match=r"other logits|shape"):
        load_model(Config(model=str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
    ],
)
def test_models_that_cannot_run_right_are_refused(tmp_path: Path, change: dict, reason: str):
    folder = save(tmp_path, "llama")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(MultiloraError, match=reason):
        load_model(Config(model=str(folder), device="cpu"))


def test_missing_weights_are_refused(tmp_path: Path):
    folder = save(tmp_path, "llama")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(MultiloraError, match="missing keys"):
        load_model(Config(model=str(folder), device="cpu"))


def test_no_model_folder(tmp_path: Path):
    with pytest.raises(MultiloraError, match=r"model: .* holds no config\.json"):
        load_model(Config(model=str(tmp_path / "nowhere"), device="cpu"))


def test_max_model_len_is_bounded_by_the_model(tmp_path: Path):
    folder = save(tmp_path, "llama")
    assert load_model(Config(model=str(folder), device="cpu", max_model_len=64)).max_model_len == 64
    with pytest.raises(MultiloraError, match="at most 128"):
        load_model(Config(model=str(folder), device="cpu", max_model_len=129))


def test_card_needs_a_tokenizer(tmp_path: Path):
    config = Config(model=str(save(tmp_path, "llama")), device="cpu")
    model = load_model(config)
    with pytest.raises(MultiloraError, match=r"tokenizer\.json"):
        model_card(model, config)
    (tmp_path / "tokenizer.json").write_text("{}")
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    card = model_card(model, config)
    assert card.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert card.chat_template == "{{ messages }}"
    assert card.eos_token_ids == [2]
