# SPDX-License-Identifier: Apache-2.0
"""Everything at once for MULTILORA_SOAK_SECONDS: nothing fails, nothing leaks, and the logits stay right.

More adapters than the pool or the host cache hold, more sequences than there are pages for, requests of all kinds that
arrive and are aborted at random.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpu_driver
import gpu_models
from gpu_driver import Driver
from gpu_models import DEVICES, TIMEOUT_S, Judge, Request, check_logits, random_sampling
from multilora_backend.adapters.state import AdapterState
from multilora_backend.core import FinishReason
from multilora_backend.protocol import Abort

SECONDS = float(os.environ.get("MULTILORA_SOAK_SECONDS", "20"))
CPU_STEPS = 300
"""By number, since what happens in seconds depends on what else the machine does."""
pytestmark = pytest.mark.timeout(2 * SECONDS + TIMEOUT_S)

RANKS = (3, 5, 8, 8, 12, 16, 16, 20, 24, 3, 33, 40, 8, 16)
ADAPTERS = {f"adapter-{i}": {"r": rank} for i, rank in enumerate(RANKS)}
RANK_VALUES, PAGE_VALUES = 4480, 8192
"""Of a rank's A and B in the model of gpu_models, and of a KV page."""
MOST_OPEN = 40
VOCAB = 61


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soak")
    gpu_models.save_model(root / "model")
    gpu_models.save_adapters(root / "model", root / "adapters", ADAPTERS)
    return root


class Traffic:
    """Random requests and aborts; takes in the answers and forgets them, but for the latest whose logits were kept."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self.driver = driver
        self.rng = random.Random(seed)
        self.answered = self.aborted = 0
        self.kept: deque[Request] = deque(maxlen=60)
        driver.record_every = 10
        driver.batches = None

    def run(self, seconds: float, least: int = 0) -> None:
        """For so long and `least` steps, then until the engine has nothing left to do."""
        driver, end, steps, turns = self.driver, time.monotonic() + seconds, 0, 0
        while time.monotonic() < end or steps < least:
            if len(driver.requests) < MOST_OPEN and self.rng.random() < 0.5:
                self._submit()
            if driver.requests and self.rng.random() < 0.03:
                self._abort()
            if driver.step():
                steps += 1
            else:
                time.sleep(0.001)
            self._settle()
            turns += 1
            if turns % 50 == 0:
                driver.engine.stats()  # as the server does; what has happened is kept until somebody asks
                driver.replayed.clear()
                driver.prompts_replayed.clear()
        driver.run()
        self._settle()
        assert not driver.requests

    def _submit(self) -> None:
        rng = self.rng
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.choice((1, 2, 10, 30, 100)))]
        if rng.random() < 0.3:
            prompt[:20] = list(range(10, 30))  # beginnings that requests share
        adapter = rng.choice(["", "", *ADAPTERS])
        self.driver.submit(prompt, adapter, **random_sampling(rng, 40))

    def _abort(self) -> None:
        number = self.rng.choice(list(self.driver.requests))
        request = self.driver.requests[number]
        index = self.rng.choice((-1, self.rng.randrange(request.sampling.n)))
        self.driver.engine.abort("front", Abort(number, index))
        for ended in range(request.sampling.n) if index < 0 else [index]:
            request.reasons.setdefault(ended, FinishReason.ABORT)

    def _settle(self) -> None:
        for number, request in list(self.driver.requests.items()):
            if len(request.reasons) < request.sampling.n:
                continue
            reason = request.reasons[0]
            assert all(0 <= token < VOCAB for token in request.token_ids)
            assert len(request.token_ids) <= request.sampling.max_tokens
            if reason is FinishReason.LENGTH:
                assert len(request.token_ids) == request.sampling.max_tokens
            self.answered += reason is not FinishReason.ABORT
            self.aborted += reason is FinishReason.ABORT
            if request.rows and reason is not FinishReason.ABORT:
                request.rows = {i: row.cpu().clone() for i, row in request.rows.items()}
                self.kept.append(request)
            del self.driver.requests[number]


def memory() -> tuple[int, int]:
    """Bytes that torch has allocated on the device, and that the process has on the host."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what glibc keeps for later is no leak
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0, pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("device", DEVICES)
def test_soak(folder: Path, device: str):
    # On the CPU in fp32: bf16 there goes through oneDNN, which keeps memory for every shape that it has met.
    seconds, steps, dtype = (SECONDS, 0, torch.bfloat16) if device == "cuda" else (0.0, CPU_STEPS, torch.float32)
    driver = Driver(
        folder,
        device,
        dtype=str(dtype).removeprefix("torch."),
        enable_prefix_caching=True,
        kv_cache_bytes=36 * PAGE_VALUES * dtype.itemsize,
        adapter_device_bytes=80 * RANK_VALUES * dtype.itemsize,
        adapter_host_bytes=80 * RANK_VALUES * dtype.itemsize,
        max_overtake_s=0.05,
    )
    traffic = Traffic(driver, seed=1)
    # Long enough that every buffer has had its largest size.
    traffic.run(min(60.0, seconds / 2), steps // 2)
    device_before, host_before = memory()
    traffic.run(seconds, steps)
    device_after, host_after = memory()

    engine = driver.engine
    stats = engine.stats()
    print(
        f"{stats.steps_total} steps, {traffic.answered} requests answered, {traffic.aborted} aborted, "
        f"{stats.adapter_loads_total} adapters loaded, {stats.adapter_evictions_total} evicted, "
        f"{stats.preemptions_total} preemptions; device {device_before} -> {device_after} bytes, "
        f"host {host_before} -> {host_after} bytes"
    )
    assert device_after <= 1.01 * device_before
    # So few steps are not enough to have seen the largest of everything.
    assert host_after <= (1.01 if device == "cuda" else 1.03) * host_before
    assert not any(record.leases for record in engine.adapters.records.values())
    active = sum(record.state is AdapterState.ACTIVE for record in engine.adapters.records.values())
    assert (engine.adapters.pool.rank > 0).sum() == active
    assert len(driver.runner.sampler._penalties) == 0
    assert not driver.runner.sampler._biases
    assert not engine.scheduler.has_work
    assert engine.pages.num_free == engine.pages.num_pages - 1

    assert traffic.answered > 5 * seconds + steps / 10
    assert traffic.aborted
    assert stats.adapter_evictions_total > 5
    assert stats.preemptions_total
    assert engine.pages.hits
    check_logits(traffic.kept, Judge(folder / "model", folder / "adapters", device))
