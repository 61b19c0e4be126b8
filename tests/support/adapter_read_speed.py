# SPDX-License-Identifier: Apache-2.0
"""A script: seconds to read and lay out a rank-16 adapter of Llama-3.1-8B, the file being in the page cache."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from multilora_backend.adapters.peft import read_adapter
from multilora_backend.core import LoraSite


def measure(folder: Path, rank: int = 16, runs: int = 7) -> list[float]:
    hidden, kv, middle, dtype = 4096, 1024, 14336, torch.bfloat16
    sites = []
    for layer in range(32):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        qkv = tuple(f"{attention}.{x}_proj" for x in "qkv")
        sites += [
            LoraSite(f"{attention}.qkv_proj", hidden, qkv, (hidden, kv, kv)),
            LoraSite(f"{attention}.o_proj", hidden, (f"{attention}.o_proj",), (hidden,)),
            LoraSite(f"{mlp}.gate_up_proj", hidden, (f"{mlp}.gate_proj", f"{mlp}.up_proj"), (middle, middle)),
            LoraSite(f"{mlp}.down_proj", middle, (f"{mlp}.down_proj",), (hidden,)),
        ]
    tensors = {}
    for site in sites:
        for module, width in zip(site.modules, site.out_features, strict=True):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, site.in_features).to(dtype)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(width, rank).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        read_adapter(folder, sites, dtype, pin=torch.cuda.is_available())
        seconds.append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print("read and layout, s:", *(f"{s:.3f}" for s in measure(Path(folder))))
