# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama, its sites, and adapters saved by PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from multilora_backend.adapters import layout
from multilora_backend.adapters.base import BaseModel
from multilora_backend.core import LoraSite
from multilora_backend.models.fusion import base_model, fuse

LAYERS, HIDDEN, MIDDLE, HEADS, KV_HEADS = 2, 32, 40, 4, 2


def make_llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=HIDDEN,
            intermediate_size=MIDDLE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            **more,
        )
    )


@pytest.fixture(autouse=True, scope="session")
def dirty_memory() -> Iterator[None]:
    """Host memory begins as NaN, so that no test passes because it happened to be zero."""
    clean = layout.allocate_buffer

    def dirty(sizes: list[int], dtype: torch.dtype, pin: bool) -> layout.Buffer:
        buffer = clean(sizes, dtype, pin)
        buffer.data.fill_(torch.nan)
        return buffer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "allocate_buffer", dirty)
        yield


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def sites() -> list[LoraSite]:
    kv = HIDDEN // HEADS * KV_HEADS
    found = []
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        qkv = tuple(f"{attention}.{x}_proj" for x in "qkv")
        found += [
            LoraSite(f"{attention}.qkv_proj", HIDDEN, qkv, (HIDDEN, kv, kv)),
            LoraSite(f"{attention}.o_proj", HIDDEN, (f"{attention}.o_proj",), (HIDDEN,)),
            LoraSite(f"{mlp}.gate_up_proj", HIDDEN, (f"{mlp}.gate_proj", f"{mlp}.up_proj"), (MIDDLE, MIDDLE)),
            LoraSite(f"{mlp}.down_proj", MIDDLE, (f"{mlp}.down_proj",), (HIDDEN,)),
        ]
    return found


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(name="x", seed=0, **LoraConfig fields) -> the folder of an adapter with random A and B."""

    def save(name: str = "adapter", seed: int = 0, **fields: Any) -> Path:
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **fields})
        model = peft.get_peft_model(make_llama(), config)
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_()
        model.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return save


@pytest.fixture
def change() -> Callable[..., Path]:
    """change(folder, field=value, ...) rewrites fields of the config."""

    def change(folder: Path, **fields: Any) -> Path:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return folder

    return change


@pytest.fixture
def edit_tensors() -> Callable[..., Path]:
    """edit_tensors(folder, function) rewrites the tensors, a dict by name."""

    def edit(folder: Path, function: Callable[[dict[str, Tensor]], Any]) -> Path:
        path = folder / "adapter_model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        function(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return folder

    return edit


@pytest.fixture
def peft_deltas() -> Callable[[Path], dict[str, Tensor]]:
    """What PEFT adds to each linear's weight: {module: [out, in]}, for the linears that it changes or not."""

    def deltas(folder: Path) -> dict[str, Tensor]:
        base = make_llama()
        before = {name: m.weight.detach().clone() for name, m in base.named_modules() if isinstance(m, nn.Linear)}
        merged = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
        after = {name: m.weight.detach() for name, m in merged.named_modules() if isinstance(m, nn.Linear)}
        return {name: after[name] - before[name] for name in before}

    return deltas


Running = tuple[list[LoraSite], BaseModel]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The model's folder, by whether embedding and head share their weight."""
    found = {tied: tmp_path_factory.mktemp("base") for tied in (False, True)}
    for tied, folder in found.items():
        make_llama(tie_word_embeddings=tied).save_pretrained(folder)
    return found


@pytest.fixture(scope="session")
def models(folders: dict[bool, Path]) -> dict[bool, Running]:
    """Of those folders, fused: nobody may change them."""
    found = {}
    for tied, folder in folders.items():
        model = LlamaForCausalLM.from_pretrained(folder)
        found[tied] = fuse(model), base_model(model)
    return found
