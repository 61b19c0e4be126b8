# SPDX-License-Identifier: Apache-2.0
"""Offline throughput of the engine at a real model's shapes, with random weights and adapters: no download, no Triton.

All requests are there from the start (closed, offline): random prompts of `--input` tokens, `--output` tokens each,
adapters round robin. Prints output tokens/s for each number of adapters and the share of the base's rate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig

from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.engine.engine import Engine
from multilora_backend.protocol import Failed, Outputs, Submit

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-3.1-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def make_model(folder: Path, shape: str, device: str) -> None:
    """A folder of random bf16 weights, made on `device`."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    Tokenizer(models.WordLevel({"w": 0}, unk_token="w")).save(str(folder / "tokenizer.json"))


def make_adapter(folder: Path, shape: str, rank: int, seed: int) -> None:
    """A PEFT folder with random A and B on all seven linears of every layer."""
    s = SHAPES[shape]
    kv = s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"]
    hidden, inner = s["hidden_size"], s["intermediate_size"]
    linears = {f"self_attn.{n}_proj": (hidden, out) for n, out in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden))}
    linears |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(s["num_hidden_layers"]):
        for name, (k, n) in linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, k, generator=generator).bfloat16() / k**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n, rank, generator=generator).bfloat16() / 100
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in linears})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def run(engine: Engine, adapters: int, arguments: argparse.Namespace) -> float:
    """Output tokens per second with that many adapters, round robin; their loads are not timed."""
    generator = torch.Generator().manual_seed(adapters)

    def submit(count: int, output: int) -> None:
        shape = (count, arguments.input)
        prompts = torch.randint(0, engine.card.vocab_size, shape, generator=generator).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.submit("benchmark", Submit(i, prompt, sampling, f"a{i % adapters}" if adapters else ""))

    def finish() -> int:
        tokens = 0
        while engine.scheduler.has_work:
            if not engine.step():
                time.sleep(0.001)
            for message in engine.take_replies().get("benchmark", []):
                if isinstance(message, Failed):
                    raise RuntimeError(message.message)
                if isinstance(message, Outputs):
                    tokens += sum(len(item.token_ids) for item in message.items)
        return tokens

    submit(max(adapters, arguments.max_num_seqs), 4)  # allocator, kernels, loads
    finish()
    submit(arguments.requests, arguments.output)
    started = time.monotonic()
    return finish() / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--adapters", default="0,1,4,16", help="numbers of adapters to run with")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    counts = [int(n) for n in arguments.adapters.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "model", arguments.shape, device)
        for i in range(max(1, *counts)):
            make_adapter(root / f"adapters/a{i}", arguments.shape, arguments.rank, i)
        torch.cuda.empty_cache()
        settings = {"model": str(root / "model"), "adapters": str(root / "adapters"), "dtype": "bfloat16"}
        settings |= {"max_num_seqs": arguments.max_num_seqs, "enable_prefix_caching": False}
        engine = Engine(Config.from_mapping(settings, "benchmark"), wake=lambda: None)
        print(f"{arguments.shape}, {name}, torch {torch.__version__}: {arguments.requests} requests, "
              f"{arguments.input} in / {arguments.output} out, rank {arguments.rank}")  # fmt: skip
        rates: dict[int, float] = {}
        for count in counts:
            rates[count] = run(engine, count, arguments)
            share = f"{100 * rates[count] / rates[0]:.0f}% of base" if 0 in rates else ""
            print(f"{count:3} adapters {rates[count]:9.0f} output tokens/s  {share}", flush=True)
        engine.close()
    if arguments.json:
        options = {key: value for key, value in vars(arguments).items() if key != "json"}
        result = {"device": name, "torch": torch.__version__, **options, "tokens_per_s": rates}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
