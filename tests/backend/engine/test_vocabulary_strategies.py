# SPDX-License-Identifier: Apache-2.0
"""Trained norms, embeddings, heads and tokens: other strategies of LoRA, graphs, launches, and who knows which token.

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
from extras_models import Launches, ResizingJudge, check, driver_of, prompts, save_trained

Q = ["q_proj", "qkv_proj"]
TABLES = ["embed_tokens", "lm_head"]
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "norms": {
        "all-norms": {"modules_to_save": ["norm"], "r": 4},
        "some-norms": {"modules_to_save": ["0.post_attention_layernorm", "q_norm"], "target_modules": Q},
        "norms-and-dora": {"modules_to_save": ["input_layernorm"], "use_dora": True},
    },
    "embedding": {
        "embedding": {"modules_to_save": ["embed_tokens"], "target_modules": Q},
        "lora-embedding": {"target_modules": ["embed_tokens"], "r": 5, "use_rslora": True},
        "dora-both": {"target_modules": [*Q, *TABLES], "use_dora": True},
        "both": {"modules_to_save": [*TABLES, "model.norm"], "target_modules": Q},
    },
    "both": {"all-norms": {"modules_to_save": ["norm"]}, "tokens": {"trainable_token_indices": [3]}},
    "added": {
        "added": {"vocabulary": 67, "modules_to_save": TABLES, "target_modules": Q},
        "resized": {"vocabulary": 63, "target_modules": ["q_proj", "o_proj", "qkv_proj"]},
        "added-lora": {"vocabulary": 70, "target_modules": [*Q, *TABLES]},
        "added-tokens": {"vocabulary": 64, "trainable_token_indices": [61, 62, 63], "target_modules": Q},
        "fewer": {"vocabulary": 60, "target_modules": Q},
    },
}
MIXED = {"plain": {"r": 3}, "dora": {"use_dora": True, "target_modules": Q}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "norms": ("qwen3", {}),
    "embedding": ("llama", {"tie_word_embeddings": False}),
    "both": ("llama", {"tie_word_embeddings": True}),
    "added": ("llama", {"tie_word_embeddings": False}),
}


@pytest.fixture(scope="module", params=GROUPS)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its adapters."""
    folder = tmp_path_factory.mktemp(request.param)
    family, settings = MODELS[request.param]
    gpu_models.save_model(folder / "model", family, **settings)
    for seed, (adapter, fields) in enumerate({**GROUPS[request.param], **MIXED}.items()):
        save_trained(folder / "model", folder / "adapters" / adapter, seed, **fields)
    return folder


@pytest.fixture(scope="module")
def judge(root: Path) -> ResizingJudge:
    return ResizingJudge(root / "model", root / "adapters", "cpu")


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


def names(root: Path) -> list[str]:
    return sorted(folder.name for folder in (root / "adapters").iterdir())


@pytest.mark.parametrize("root", ["embedding", "norms", "added"], indirect=True)
@pytest.mark.parametrize(("strategy", "graphs"), [("reference", False), ("bordered", True)])
def test_by_other_strategies_and_beside_graphs(root: Path, judge: ResizingJudge, strategy: str, graphs: bool):
    adapters = names(root)
    driver = driver_of(root, strategy, graphs).preload(adapters)
    for adapter, prompt in zip(["", *adapters], prompts(len(adapters) + 1, 59), strict=True):
        driver.submit(prompt, adapter, max_tokens=32)
    check(list(driver.run().requests.values()), judge)


@pytest.mark.parametrize("root", ["both"], indirect=True)
def test_a_batch_without_them_launches_what_it_did_before(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Whoever is resident: who has no such adapter pays nothing."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "model").symlink_to(root / "model")
    shutil.copytree(root / "adapters" / "plain", tmp_path / "adapters" / "plain")

    def launches(folder: Path, asked: list[str]) -> Counter[tuple]:
        driver = driver_of(folder, "grouped").preload(names(folder))
        for name in asked:
            driver.submit([5, 6, 7], name, max_tokens=5)
        with monkeypatch.context() as patch, Launches(patch) as counted:
            driver.run()
        return counted.counts

    asked = ["", "plain", "plain"]
    assert launches(tmp_path, asked) == launches(root, asked)
    assert launches(root, asked) != launches(root, ["", "plain", "all-norms"])


@pytest.mark.parametrize("root", ["added"], indirect=True)
def test_added_tokens_are_read_and_written(root: Path, judge: ResizingJudge):
    """In prompts, in outputs, under penalties and with log probabilities, beside requests that do not know them."""
    driver = driver_of(root, "grouped").preload(names(root))
    for adapter, known in (("added", 67), ("added-lora", 70), ("added-tokens", 64), ("resized", 63)):
        driver.submit([5, known - 1, 61, 6], adapter, max_tokens=32)
        driver.submit([known - 1], adapter, max_tokens=32, temperature=50.0, seed=3, presence_penalty=1.0, logprobs=2)
    driver.submit([5, 6], "plain", max_tokens=32, temperature=50.0, seed=4, frequency_penalty=0.5, logit_bias={7: 1.0})
    driver.run()
    requests = list(driver.requests.values())
    check([r for r in requests if not r.sampling.temperature], judge)
    warm = [r for r in requests if r.sampling.temperature]
    for request, known in zip(warm, (67, 70, 64, 63, 61), strict=True):
        assert max(request.token_ids) < known
        assert len(request.token_ids) == 32
    assert sum(token >= 61 for request in warm for token in request.token_ids) > 3, "or this would show nothing"
    assert driver.runner.sampler._penalties._said.shape[1] >= 67


@pytest.mark.parametrize("root", ["added"], indirect=True)
def test_who_does_not_know_a_token_may_not_ask_for_it(root: Path):
    driver = driver_of(root, "grouped").preload(names(root))
    cases = (("", 61), ("plain", 61), ("resized", 63), ("added", 67), ("fewer", 60))
    for number, (adapter, known) in enumerate(cases):
        driver.submit([3, known], adapter)
        driver.step()
        assert driver.failed[number].message.endswith(f"token ids must be below the vocabulary's {known}")
