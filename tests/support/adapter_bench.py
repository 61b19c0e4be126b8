# SPDX-License-Identifier: Apache-2.0
"""An adapter manager whose loader has no threads and whose clock only tests move.

As a script: seconds to read and lay out a rank-16 adapter of Llama-3.1-8B, the file being in the page cache.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.layout import AdapterWeights, allocate, numel
from multilora_backend.adapters.loader import Job, Outcome
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.peft import AdapterPlan, fingerprint, read_adapter
from multilora_backend.adapters.pool import Transfer
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import LoraSite

SITE = LoraSite("linear", in_features=3, modules=("linear",), out_features=(2,))
BYTES_PER_RANK = 4 * (3 + 2)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class MemoryLoader:
    """Jobs end when a test says so. An adapter's content is its rank, or why it is broken or cannot be read."""

    def __init__(self, content: dict[str, int | str | OSError], pin: bool = False) -> None:
        self.content = content
        self.pin = pin
        self.jobs: list[Job] = []
        self.outcomes: list[Outcome] = []
        self.read: list[str] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def run(self, count: int = 10**6) -> None:
        for job in self.jobs[:count]:
            content, now = self.content[job.name], fingerprint(job.folder)
            if isinstance(content, OSError):
                self.outcomes.append(Outcome(job, None, reason=str(content)))
            elif isinstance(content, str):
                self.outcomes.append(Outcome(job, now, reason=content))
            elif not job.weights:
                self.outcomes.append(Outcome(job, now, plan=AdapterPlan((), content, numel(SITE, content))))
            elif job.cached is not None and job.known == now:
                self.outcomes.append(Outcome(job, now, weights=job.cached))
            else:
                self.read.append(job.name)
                self.outcomes.append(Outcome(job, now, weights=weights_of(job.name, content, self.pin)))
        del self.jobs[:count]

    def finished(self) -> list[Outcome]:
        outcomes, self.outcomes = self.outcomes, []
        return outcomes

    def wait_idle(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass


def weights_of(name: str, rank: int, pin: bool = False) -> AdapterWeights:
    buffers, (site,) = allocate([SITE], {0}, rank, torch.float32, pin)
    for tensor in (site.a, site.b):
        tensor.zero_()
        tensor[:rank] = float(sum(name.encode()))
    return AdapterWeights(f"{name}-r{rank}", rank, (site,), buffers, no_effect=False)


class HeldEvent:
    """A CUDA event that a test lets happen, or fail: `now` does what the copies before it do."""

    def __init__(self, now: Callable[[], None]) -> None:
        self.now = now
        self.done = False
        self.error: RuntimeError | None = None

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.done

    def happen(self) -> None:
        self.now()
        self.done = True


class Bench:
    def __init__(
        self,
        content: dict[str, int | str | OSError],
        ranks: int = 24,
        root: Path = Path("/nowhere"),
        hold: bool = False,
        device: str = "cpu",
        **more,
    ) -> None:
        """`hold`: what is written to the pool is garbage until `arrive`."""
        self.clock = Clock()
        self.loader = MemoryLoader(content, pin=device == "cuda")
        settings = {"host_bytes": 10**6, "load_threads": 8, **more}
        self.manager = AdapterManager(
            Catalogue((name, root / name) for name in content),
            [SITE],
            device_bytes=ranks * BYTES_PER_RANK,
            dtype=torch.float32,
            device=device,
            clock=self.clock,
            loader=self.loader,
            **settings,
        )
        self.held: list[HeldEvent] = []
        if hold:
            self.pool_write = self.manager.pool.write
            self.manager.pool.write = self.write_later

    def write_later(self, weights: AdapterWeights, slot: int, rank_start: int, extras_start: int = 0) -> Transfer:
        self.pool_write(weights, slot, rank_start, extras_start)
        ranks = slice(rank_start, rank_start + padded(weights.rank))
        self.manager.pool.b[0][ranks] = torch.nan
        self.held.append(HeldEvent(lambda: self.manager.pool._copy(weights, rank_start)))
        return Transfer(weights, self.held[-1])

    def arrive(self, count: int = 10**6) -> None:
        for event in self.held[:count]:
            event.happen()
        del self.held[:count]

    def land(self) -> list[str]:
        self.loader.run()
        return self.manager.poll()

    def activate(self, *names: str) -> None:
        for name in names:
            self.clock.now += 1
            self.manager.request(name)
            self.land()
            if self.manager.transferring and not self.held:  # on a real device
                torch.cuda.synchronize()
                self.manager.poll()
            assert self.state(name) is AdapterState.ACTIVE

    def state(self, name: str) -> AdapterState:
        return self.manager.records[name].state


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
