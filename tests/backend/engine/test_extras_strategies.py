# SPDX-License-Identifier: Apache-2.0
"""Adapters that are more than A and B: other strategies of LoRA, graphs, and what steps launch with and without them.

That they are what peft makes of them, tests/parity shows for every model.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gpu_driver
import gpu_models
from extras_models import ATTENTION, TOKENS, Launches, check, driver_of, prompts, save_trained
from gpu_driver import Driver, Mode
from gpu_models import Judge, Request

ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "r": 6},
    "lora-bias": {"lora_bias": True, "r": 20},
    "bias-all": {"bias": "all", "target_modules": ["down_proj"]},
    "dora-bias-lora": {"use_dora": True, "bias": "lora_only", "target_modules": ATTENTION, "use_rslora": True},
    "plain": {"r": 3},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "phi3": ("phi3", {}),  # one linear for q, k and v, and one for gate and up
}


@pytest.fixture(scope="module", params=FAMILIES)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its adapters."""
    folder = tmp_path_factory.mktemp(request.param)
    family, settings = FAMILIES[request.param]
    gpu_models.save_model(folder / "model", family, **settings)
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        save_trained(folder / "model", folder / "adapters" / name, seed, **fields)
    return folder


@pytest.fixture(scope="module")
def judge(root: Path) -> Judge:
    return Judge(root / "model", root / "adapters", "cpu")


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


def submit_all(driver: Driver) -> list[Request]:
    for name, prompt in zip(["", *ADAPTERS], [prompts()[1], *prompts(5)], strict=True):
        driver.submit(prompt, name, max_tokens=TOKENS)
    return list(driver.run().requests.values())


@pytest.mark.parametrize(("strategy", "graphs"), [("reference", False), ("bordered", True)])
def test_by_the_reference_and_beside_graphs(root: Path, judge: Judge, strategy: str, graphs: bool):
    """With graphs, steps that have extras run outside of them, and all others inside."""
    driver = driver_of(root, strategy, graphs).preload(ADAPTERS)
    check(submit_all(driver), judge)
    assert all(rows == 1 for rows, *_ in driver.replayed), "only when the one without extras is left"
    driver.clear()
    for name in ("", "plain"):
        driver.submit([5, 6, 7], name, max_tokens=4)
    driver.run()
    assert bool(driver.replayed) == graphs


@pytest.mark.parametrize("root", ["llama-biased"], indirect=True)
@pytest.mark.parametrize("strategy", ["grouped", "bordered"])
def test_a_batch_without_extras_launches_what_it_did_before(
    root: Path, strategy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The device may be full of DoRA: who does not use it pays nothing."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "model").symlink_to(root / "model")
    shutil.copytree(root / "adapters" / "plain", tmp_path / "adapters" / "plain")

    def launches(folder: Path, names: list[str], *also: str) -> Counter[tuple]:
        settings = {"dtype": "float32", "block_size": 4, "max_num_batched_tokens": 16, "kv_cache_bytes": 2**23}
        driver = Driver(folder, "cpu", Mode(strategy, False), overlap=False, **settings).preload(["plain", *also])
        for name in names:
            driver.submit([5, 6, 7], name, max_tokens=5)
        with monkeypatch.context() as patch, Launches(patch) as counted:
            driver.run()
        return counted.counts

    names = ["", "plain", "plain"]
    before, after = launches(tmp_path, names), launches(root, names, *ADAPTERS)
    assert before == after
    assert ("row_affine",) not in after
    assert before["grouped_expand",] > 0
    # 5 steps of 2 layers: only the linears that the adapter scales or shifts, and q/k/v and gate/up no more in one go.
    biased = launches(root, [*names, "dora-bias-lora"], *ADAPTERS)
    assert biased["row_affine",] == 5 * 2 * 2, "q/k/v and o"
    assert biased["grouped_expand",] == 5 * 2 * 3, "and down"


@pytest.mark.parametrize("root", ["llama-biased"], indirect=True)
@pytest.mark.parametrize("strategy", ["grouped", "bordered"])
def test_warm_up_launches_what_extras_will_need(root: Path, strategy: str, monkeypatch: pytest.MonkeyPatch):
    """Kernels are compiled before the engine is ready, also those of adapters that come later."""
    driver = Driver(root, "cpu", Mode(strategy, False), overlap=False, dtype="float32")
    with monkeypatch.context() as patch, Launches(patch) as counted:
        driver.runner.warm_up(40)
    kinds = 2 * (1 + (strategy == "bordered"))  # ranks up to 16 and beyond, and both with the border
    assert counted.counts["row_affine",] == 2 * kinds * 8, "2 sizes, 4 linears in 2 layers"
    none = Driver(root, "cpu", Mode(strategy, False), overlap=False, dtype="float32", adapter_extras_bytes=1)
    with monkeypatch.context() as patch, Launches(patch) as counted:
        none.runner.warm_up(40)
    assert not counted.counts["row_affine",], "where there is no room for extras there are none to be ready for"
