# SPDX-License-Identifier: Apache-2.0
"""Once an engine is ready no request waits for a compiler or for a capture, whatever is in its batches."""

from __future__ import annotations

import importlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gpu_driver
import gpu_models
from compilations import Compilations, watched
from extras_models import EXTRAS, save_trained
from gpu_driver import BORDERED_GRAPHS, Driver, Mode
from gpu_models import CUDA, MIXED_RANKS, TIMEOUT_S, WITH_EXPERTS, random_sampling
from multilora_kernels._triton import INTERPRETED, triton

pytestmark = [
    pytest.mark.timeout(TIMEOUT_S),
    pytest.mark.skipif(triton is None or INTERPRETED, reason="needs Triton-lang, and not its interpreter"),
]

CASES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "none": ("llama", {}, {}),
    "ranks": ("llama", {}, MIXED_RANKS),
    # With widths that no other linear has.
    "experts": ("qwen3_moe", {"moe_intermediate_size": 80}, WITH_EXPERTS),
    "affine": ("llama", {"attention_bias": True}, EXTRAS["affine"]),
    "tables": ("llama", {}, {**EXTRAS["tables"], **EXTRAS["added"]}),
}
"""Family, more of its config, and adapters."""
MANY = 66
"""More different adapters than a captured prompt step takes."""
MAX_ROWS = 2100
LENGTHS = (1, 2, 15, 16, 17, 40, 100, 240)
COUNTS = (1, 2, 3, 8, 16, 17, 40, 80)


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


def play(driver: Driver, names: list[str], seed: int) -> None:
    """Batches of one adapter, of a few and of all, from one row to as many as a step may have."""
    rng = random.Random(seed)
    for turn in range(20):
        driver.clear()
        everyone = turn % 4 == 0
        among = names if everyone else rng.sample(names, min(len(names), rng.choice((1, 2, 3))))
        count = max(COUNTS) if everyone else rng.choice(COUNTS)
        longest = rng.choice(LENGTHS) if turn else 1
        greedy = rng.random() < 0.5
        for number in range(count):
            prompt = [rng.randrange(3, 60) for _ in range(rng.choice((longest, longest, 1, rng.randint(1, longest))))]
            sampling = {"max_tokens": rng.randint(1, 4)} if greedy else random_sampling(rng, 4)
            driver.submit(prompt, among[number % len(among)], **sampling)
        driver.run()


def ready(folder: Path, device: str, mode: Mode, max_rows: int, seen: Compilations) -> Driver:
    driver = Driver(
        folder,
        device,
        mode,
        adapters=str(folder / "adapters") if (folder / "adapters").exists() else "",
        max_num_seqs=min(80, max_rows),
        max_num_batched_tokens=max_rows,
        kv_cache_bytes=24 * 2**20,
        adapter_device_bytes=2**25,
        max_loras=80,
        enable_prefix_caching=True,
    )
    if device == "cpu":  # as `create_runner` does on CUDA
        driver.runner.warm_up(max_rows)
    assert seen.take()
    return driver


EAGER = [Mode("bordered", graphs=False), Mode("grouped", graphs=False)]
RUNS = [("cpu", mode, "ranks", MAX_ROWS) for mode in EAGER]
RUNS += [("cpu", EAGER[0], case, 600) for case in ("none", "experts", "affine", "tables")]
RUNS += [("cpu", EAGER[0], "ranks", 48)]
ON_CUDA = [("cuda", BORDERED_GRAPHS, case, MAX_ROWS) for case in CASES] + [("cuda", BORDERED_GRAPHS, "ranks", 48)]
ON_CUDA += [("cuda", *run) for _, *run in RUNS]


@pytest.mark.parametrize(
    ("device", "mode", "case", "max_rows"), [*RUNS, *(pytest.param(*run, marks=CUDA) for run in ON_CUDA)], ids=str
)
def test_nothing_is_compiled_for_a_request(
    tmp_path: Path, device: str, mode: Mode, case: str, max_rows: int, monkeypatch: pytest.MonkeyPatch
):
    # Of the model's 61 tokens two parts of a row, as other models' 128,256 have many; an adapter's 67 are three.
    for name in ("BLOCK", "GREEDY_BLOCK"):
        monkeypatch.setattr(importlib.import_module("multilora_kernels.draw"), name, 32)
    family, settings, adapters = CASES[case]
    gpu_models.save_model(tmp_path / "model", family, **settings)
    for seed, (name, fields) in enumerate(adapters.items()):
        save_trained(tmp_path / "model", tmp_path / "adapters" / name, seed, **fields)
    names = ["", *adapters]
    if case == "ranks":
        names += [f"more-{i}" for i in range(MANY)]
        for name in names[-MANY:]:
            shutil.copytree(tmp_path / "adapters" / "r3", tmp_path / "adapters" / name)
    with watched(device) as seen:
        driver = ready(tmp_path, device, mode, max_rows, seen)
        play(driver, names, seed=1)
        assert seen.take() == []
        most = driver.engine.statistics.adapters_per_step_max
    everyone = min(len(names), max_rows) - 1  # the base model is among them
    assert (most or 0) >= (min(everyone, 65) if case == "ranks" else everyone)
