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
from extras_models import ATTENTION, save_trained
from gpu_driver import BORDERED_GRAPHS, Driver, Mode
from gpu_models import CUDA, TIMEOUT_S
from multilora_kernels._triton import INTERPRETED, triton

pytestmark = [
    pytest.mark.timeout(TIMEOUT_S),
    pytest.mark.skipif(triton is None or INTERPRETED, reason="needs Triton-lang, and not its interpreter"),
]

TABLES = ["embed_tokens", "lm_head"]
RANKS: dict[str, dict[str, Any]] = {
    "r3": {"r": 3},
    "attention": {"r": 8, "target_modules": ATTENTION},
    "r16": {"r": 16},
    "r40": {"r": 40},
    "r100": {"r": 100},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["gate_up_proj", "experts.down_proj"], "r": 3},
    "everything": {"r": 20},
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "none": ("llama", {}, {}),
    "ranks": ("llama", {}, RANKS),
    "experts": ("qwen3_moe", {"moe_intermediate_size": 80}, EXPERTS),
    "affine": (
        "llama",
        {"attention_bias": True},
        {
            "dora": {"use_dora": True, "r": 6},
            "lora-bias": {"lora_bias": True, "r": 20},
            "dora-bias": {"use_dora": True, "bias": "all", "target_modules": ATTENTION},
            "plain": {"r": 3},
        },
    ),
    "tables": (
        "llama",
        {},
        {
            "norms": {"modules_to_save": ["norm"], "r": 4},
            "lora-both": {"target_modules": [*ATTENTION, *TABLES], "use_dora": True},
            "added": {"vocabulary": 67, "modules_to_save": TABLES, "target_modules": ATTENTION},
            "aligned": {"vocabulary": 64, "modules_to_save": TABLES, "target_modules": ATTENTION},
            "fewer": {"vocabulary": 60},
        },
    ),
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


def sampling_of(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 11,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "logprobs": 3,
        "logit_bias": {5: 2.0},
        "min_tokens": 1,
        "n": 2,
    }
    return {name: options[name] for name in rng.sample(list(options), rng.choice((0, 0, 1, 3)))}


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
            sampling = {} if greedy else sampling_of(rng)
            driver.submit(prompt, among[number % len(among)], max_tokens=rng.randint(1, 4), **sampling)
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
    assert (most or 0) >= min(max_rows - 1, 65 if case == "ranks" else len(adapters))
