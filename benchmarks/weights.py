# SPDX-License-Identifier: Apache-2.0
"""Model and adapter folders of random bf16 weights at a `Shape`, made on the device and kept for the next run.

Everything is random, since power, and with it the clock, depends on the data: on one H200 a product of zeros ran at 894
TFLOP/s, one of random numbers at 788. Files are written as safetensors directly: a header of names and offsets, then
the tensors' bytes, which are slices of one random block. So an 8B model is a matter of copying 16 GB to the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from shapes import SHAPES, Shape
from tokenizers import Tokenizer, models, pre_tokenizers

STD = 0.02
"""Of every weight but the norms', transformers' own choice. An adapter's delta is then about 0.3 of a base output."""
STAGING_BYTES = 16 * 2**20
"""On CUDA the pool's budget includes the buffer that weights pass through on their way."""
WRITERS = 8
"""Files written at the same time: one thread copies from the device at about 3 GB/s."""

Tensors = Sequence[tuple[str, tuple[int, ...]]]


def write_safetensors(path: Path, tensors: Tensors, device: str, seed: int) -> None:
    """bf16, normal around 0, norms (the one-dimensional ones) around 1."""
    generator = torch.Generator(device).manual_seed(seed)
    numel = sum(prod(shape) for _, shape in tensors)
    block = torch.randn(numel, generator=generator, device=device, dtype=torch.bfloat16).mul_(STD)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors:
        end = at + prod(shape)
        if len(shape) == 1:
            block[at:end] += 1
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [2 * at, 2 * end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = block.cpu().view(torch.uint8).numpy().data
        while left:  # Linux writes at most 2 GiB at once
            left = left[file.write(left) :]


def make_model(folder: Path, shape: Shape, device: str) -> None:
    """A transformers folder, and a tokenizer of as many words as the model has ids: `w0`, `w1`, ..."""
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[tensor] for tensor in shape.ends()]
    per_file = -(-shape.num_hidden_layers // (2 * WRITERS))
    for first in range(0, shape.num_hidden_layers, per_file):
        layers = range(first, min(first + per_file, shape.num_hidden_layers))
        parts.append([tensor for index in layers for tensor in shape.layer(index)])
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs = [
            pool.submit(write_safetensors, folder / name, part, device, seed)
            for seed, (name, part) in enumerate(zip(names, parts, strict=True))
        ]
    for job in jobs:
        job.result()
    files = {tensor: name for name, part in zip(names, parts, strict=True) for tensor, _ in part}
    size = 2 * sum(prod(dims) for part in parts for _, dims in part)
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def make_adapter(folder: Path, shape: Shape, rank: int, seed: int, device: str) -> None:
    """A PEFT folder with A and B on all seven linears of every layer."""
    tensors = []
    for layer in range(shape.num_hidden_layers):
        for name, (k, n) in shape.linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors += [(f"{prefix}.lora_A.weight", (rank, k)), (f"{prefix}.lora_B.weight", (n, rank))]
    write_safetensors(folder / "adapter_model.safetensors", tensors, device, seed)
    targets = sorted({name.rpartition(".")[2] for name in shape.linears})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Workdir:
    """Folders that are made once: `ROOT/SHAPE/model` and `ROOT/SHAPE/adapters/rRANK-INDEX`."""

    root: Path
    shape_name: str
    device: str

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    def model(self) -> Path:
        return self._once("model", lambda folder: make_model(folder, self.shape, self.device))

    def adapters(self, names: Iterable[str]) -> Path:
        """A catalogue (a JSON file) of these adapters, see `adapter_name`."""
        wanted = sorted(set(names))
        with ThreadPoolExecutor(WRITERS) as pool:
            paths = list(pool.map(self._adapter, wanted))
        catalogue = {name: str(path) for name, path in zip(wanted, paths, strict=True)}
        handle, path = tempfile.mkstemp(suffix=".json", prefix="adapters-", dir=self.root)
        with open(handle, "w") as file:
            json.dump(catalogue, file)
        return Path(path)

    def _adapter(self, name: str) -> Path:
        rank, index = rank_and_index(name)

        def make(folder: Path) -> None:
            make_adapter(folder, self.shape, rank, 1000 * rank + index, self.device)

        return self._once(f"adapters/{name}", make)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        target = self.root.resolve() / self.shape_name / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                make(unfinished)
                os.replace(unfinished, target)  # in one step: a run that is cut off leaves nothing that looks whole
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return target


def adapter_name(rank: int, index: int) -> str:
    return f"r{rank}-{index}"


def rank_and_index(name: str) -> tuple[int, int]:
    rank, _, index = name[1:].partition("-")
    return int(rank), int(index)


def device_bytes(shape: Shape, names: Iterable[str]) -> int:
    """An adapter pool that holds these adapters and no more: `adapter_device_bytes`."""
    ranks = sum(-(-rank_and_index(name)[0] // 8) * 8 for name in set(names))
    return ranks * shape.bytes_per_rank + (STAGING_BYTES if torch.cuda.is_available() else 0)


def round_robin(names: Sequence[str], count: int) -> list[str]:
    return [names[i % len(names)] for i in range(count)]


def settings_for(model: Path, catalogue: Path | None, device_bytes: int, **more: object) -> dict[str, object]:
    """The engine's configuration for a benchmark: bf16, no prefix cache, a pool of exactly this size."""
    settings: dict[str, object] = {"model": str(model), "dtype": "bfloat16", "enable_prefix_caching": False}
    if catalogue is not None:
        settings |= {"adapters": str(catalogue), "adapter_device_bytes": device_bytes}
    return settings | more
