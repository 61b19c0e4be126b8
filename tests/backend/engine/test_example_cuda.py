# SPDX-License-Identifier: Apache-2.0
"""The example model in bf16: every adapter answers words right that it has never seen, all of them in one batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import gpu_driver
from gpu_driver import Driver, Mode
from gpu_models import DEVICES, TIMEOUT_S
from multilora_backend.core import FinishReason

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))
from tiny.tasks import BASE, TASKS, held_out_words  # noqa: E402

pytestmark = pytest.mark.timeout(TIMEOUT_S)


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gpu_driver.free_drivers()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["grouped", "bordered"])
def test_all_answers_are_right(device: str, strategy: str):
    words = held_out_words(40 if device == "cuda" else 8, seed=5)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EXAMPLES / "tiny/model")
    settings = {"kv_cache_bytes": 64 * 2**20, "adapter_device_bytes": 64 * 2**20}
    # FlashInfer has no kernel for this model's heads of 32, and without it nothing is captured.
    driver = Driver(EXAMPLES / "tiny", device, Mode(strategy, graphs=False), max_num_seqs=64, **settings)
    jobs = [(word, task) for word in words for task in TASKS]
    for word, task in jobs:
        prompt = tokenizer(word)["input_ids"]
        driver.submit(prompt, "" if task == BASE else task, max_tokens=30, ignore_eos=False)
    driver.run()
    assert driver.engine.statistics.adapters_per_step_max == len(TASKS) - 1
    for (word, task), request in zip(jobs, driver.requests.values(), strict=True):
        assert tokenizer.decode(request.token_ids, skip_special_tokens=True) == TASKS[task](word), (word, task)
        assert request.reasons == {0: FinishReason.STOP}
