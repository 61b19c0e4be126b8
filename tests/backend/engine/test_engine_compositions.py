# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one request: prefixes that sums share, sums that are nothing new, and broken parts.

That they are what PEFT's `add_weighted_adapter` makes of them, tests/parity shows for every model.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tiny_models
from multilora_backend.core import SamplingParams
from multilora_backend.errors import MultiloraError
from multilora_backend.protocol import Failed, Submit
from step_lab import StepLab

ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 6},
    "b": {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "c": {"r": 3, "use_rslora": True, "rank_pattern": {"o_proj": 5}, "alpha_pattern": {"up_proj": 2}},
}
PROMPT = [5, 6, 7, 40, 3, 11, 29, 8, 60, 17, 23]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_models.save_llama(root / "model")
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        tiny_models.save_adapter(root / "model", root / "adapters" / name, seed, **fields)
    return root


@pytest.fixture
def lab(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    made = StepLab(folder / "model", tmp_path / "adapters")
    yield made
    made.close()


def test_equal_sums_share_their_prefix_and_others_do_not(lab):
    long = [(7 * i) % 59 + 1 for i in range(40)]
    tokens = lab.greedy([("a:0.7,b:0.3", long)], 8)
    before = lab.engine.pages.hits
    assert lab.greedy([("b:0.3,a:0.7", long)], 8) == tokens
    assert lab.engine.pages.hits - before == 36, "all full pages but that of the last token"
    before = lab.engine.pages.hits
    lab.greedy([("a:0.7,b:0.4", long), ("a", long), ("", long), ("a:0.7", long)], 2)
    assert lab.engine.pages.hits == before


def test_nothing_left_is_the_base_model(lab):
    assert lab.greedy([("a:0,b:0", PROMPT)], 8) == lab.greedy([("", PROMPT)], 8)
    assert lab.greedy([("b:2,c:0", PROMPT)], 8) == lab.greedy([("b:2", PROMPT)], 8)
    assert lab.greedy([("a:1", PROMPT)], 8) == lab.greedy([("a", PROMPT)], 8)


def test_a_broken_part_ends_only_its_requests(lab, tmp_path: Path):
    (tmp_path / "adapters/b/adapter_model.safetensors").write_bytes(b"no weights")
    engine = lab.engine
    engine.submit("front", Submit(0, PROMPT, SamplingParams(max_tokens=4), "a:0.5,b:0.25"))
    failed = []
    while not engine.idle:
        engine.step()
        failed += [m for m in engine.take_replies().get("front", []) if isinstance(m, Failed)]
    assert failed[0].message.startswith("LoRA a:0.5,b:0.25 could not be loaded: its part b: ")
    with pytest.raises(MultiloraError, match="LoRA b could not be loaded"):
        engine.adapters.resolve("a:0.5,b:0.25")
    assert lab.greedy([("a:0.5", PROMPT)], 4)
