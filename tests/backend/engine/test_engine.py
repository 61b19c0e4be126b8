# SPDX-License-Identifier: Apache-2.0
"""The engine without sockets: what a request gets does not depend on its company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine_bench import ADAPTERS, GREEDY, PROMPTS, Driver
from multilora_backend.core import SamplingParams

pytestmark = pytest.mark.usefixtures("mode")


def test_a_mixed_batch_says_what_transformers_and_peft_say(folder: Path, expected: dict):
    driver = Driver(folder)
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        driver.submit(i, prompt, GREEDY, name)
    driver.run()
    assert {name: driver.tokens[i, 0] for i, name in enumerate(PROMPTS)} == expected
    assert driver.engine.statistics.adapters_per_step_max == 3
    assert len({tuple(t) for t in expected.values()}) == 4, "the adapters must disagree, or this test shows nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 5},
        {"max_num_seqs": 2},
        {"max_loras": 1},
        {"enable_prefix_caching": False},
        {"strategies": ""},
    ],
    ids=str,
)
def test_limits_change_when_but_not_what(folder: Path, expected: dict, settings: dict):
    driver = Driver(folder, **settings)
    for i, (name, prompt) in enumerate([*PROMPTS.items()] * 2):
        driver.submit(i, prompt, GREEDY, name)
    driver.run()
    for i, name in enumerate([*PROMPTS] * 2):
        assert driver.tokens[i, 0] == expected[name]
    if settings.get("max_loras"):
        assert driver.engine.statistics.adapters_per_step_max == 1


def test_preemption_changes_nothing(folder: Path, expected: dict):
    page_bytes = 4 * 2 * 2 * 2 * 8 * 4  # 4 tokens, 2 layers, K and V, 2 heads of 8, fp32
    driver = Driver(folder, kv_cache_bytes=8 * page_bytes, enable_prefix_caching=False)
    names = ["", "small", "attention"] * 2
    for i, name in enumerate(names):
        driver.submit(i, PROMPTS[name], GREEDY, name)
    driver.run()
    assert driver.engine.scheduler.preemptions > 0
    for i, name in enumerate(names):
        assert driver.tokens[i, 0] == expected[name]


def test_pausing_changes_nothing(folder: Path, expected: dict):
    """Adapters that take turns of next to nothing: whatever is paused goes on with the pages that it had."""
    driver = Driver(folder, max_loras=1, tenure_s=1e-6, max_overtake_s=0.0)
    names = ["", "small", "attention", "rank-stabilised"] * 3
    for i, name in enumerate(names):
        driver.submit(i, PROMPTS[name], GREEDY, name)
    driver.run()
    assert driver.engine.scheduler.pauses > 9
    assert driver.engine.scheduler.preemptions == 0
    assert driver.engine.statistics.adapters_per_step_max == 1
    for i, name in enumerate(names):
        assert driver.tokens[i, 0] == expected[name]
    driver.engine.check_idle()


def test_device_room_for_one_adapter_serves_all_in_turn(folder: Path, expected: dict):
    bytes_per_rank = Driver(folder).engine.adapters.pool.bytes_per_rank
    driver = Driver(folder, adapter_device_bytes=16 * bytes_per_rank)
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        driver.submit(i, prompt, GREEDY, name)
    driver.run()
    assert {name: driver.tokens[i, 0] for i, name in enumerate(PROMPTS)} == expected
    assert driver.engine.stats().adapter_evictions_total >= 1


def test_a_seed_gives_the_same_text_in_any_company(folder: Path):
    seeded = SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
    alone = Driver(folder)
    alone.submit(0, [5, 6, 7], seeded, "small")
    crowd = Driver(folder, max_num_batched_tokens=11)
    for i in range(1, 12):
        crowd.submit(i, [5 + i] * i, SamplingParams(max_tokens=20, ignore_eos=True), [*PROMPTS][i % 4])
    crowd.step()
    crowd.submit(0, [5, 6, 7], seeded, "small")
    assert alone.run().tokens[0, 0] == crowd.run().tokens[0, 0]
    other = Driver(folder)
    other.submit(0, [5, 6, 7], SamplingParams(temperature=1.0, seed=8, max_tokens=12, ignore_eos=True), "small")
    assert other.run().tokens[0, 0] != alone.tokens[0, 0]


def test_nan_in_one_adapter_touches_no_other_row(folder: Path, expected: dict):
    driver = Driver(folder)
    for name in ADAPTERS:  # loaded once, then one of them is spoilt where it lies
        driver.submit(0, [3], SamplingParams(temperature=0.0, max_tokens=1), name)
        driver.run()
    pool, lease = driver.engine.adapters.pool, driver.engine.adapters.lease("small")
    for a, b in zip(pool.a, pool.b, strict=True):
        slices = len(a) // pool.num_ranks
        a[lease.rank_start * slices : (lease.rank_start + 8) * slices] = torch.nan
        b[lease.rank_start : lease.rank_start + 8] = torch.nan
    driver.engine.adapters.release(lease)
    for i, (name, prompt) in enumerate([*PROMPTS.items()] * 3, start=1):
        driver.submit(i, prompt, GREEDY, name)
    driver.run()
    for i, name in enumerate([*PROMPTS] * 3, start=1):
        assert name == "small" or driver.tokens[i, 0] == expected[name]


def test_n_sequences_differ_and_are_reproducible(folder: Path):
    runs = []
    for _ in range(2):
        driver = Driver(folder)
        driver.submit(0, [5, 6], SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True), "small")
        driver.run()
        runs.append([driver.tokens[0, i] for i in range(3)])
    assert runs[0] == runs[1]
    assert len({tuple(t) for t in runs[0]}) == 3


def test_ends(folder: Path, expected: dict):
    base = expected[""]
    stop = base[4]
    until = base.index(stop) + 1
    driver = Driver(folder, max_model_len=20)
    driver.submit(
        0, PROMPTS[""], SamplingParams(temperature=0.0, max_tokens=50, stop_token_ids=(stop,), ignore_eos=True)
    )
    driver.submit(1, PROMPTS[""], SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True))
    driver.submit(2, PROMPTS[""], SamplingParams(temperature=0.0, max_tokens=2))
    eos_next = SamplingParams(temperature=0.0, max_tokens=5, logit_bias={2: 100.0})
    driver.submit(3, PROMPTS[""], eos_next)
    driver.submit(4, PROMPTS[""], SamplingParams(temperature=0.0, max_tokens=5, min_tokens=3, logit_bias={2: 100.0}))
    driver.run()
    assert driver.tokens[0, 0] == base[:until]
    assert [driver.reasons[i, 0].value for i in range(5)] == ["stop", "length", "length", "stop", "stop"]
    assert len(driver.tokens[1, 0]) == 17, "prompt and output fill max_model_len"
    assert driver.tokens[3, 0] == [2]
    assert len(driver.tokens[4, 0]) == 4
    assert driver.tokens[4, 0][-1] == 2


def test_logprobs_come_with_every_token(folder: Path):
    driver = Driver(folder)
    driver.submit(0, [5, 6], SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, ignore_eos=True), "small")
    driver.run()
    total = 0.0
    for item in driver.outputs:
        [entries] = item.logprobs
        assert [e.rank for e in entries] == [1, 1, 2]
        assert entries[0].token_id == item.token_ids[0]
        total += entries[0].logprob
        assert item.cumulative_logprob == pytest.approx(total)


def test_without_adapters_lora_is_off(folder: Path, expected: dict):
    driver = Driver(folder, adapters="")
    driver.submit(0, [5], GREEDY, "small")
    driver.submit(1, PROMPTS[""], GREEDY)
    driver.run()
    assert driver.failed[0].message == "LoRA feature is not enabled."
    assert driver.tokens[1, 0] == expected[""]


def test_stats_tell_what_happened(folder: Path):
    driver = Driver(folder)
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        driver.submit(i, prompt, GREEDY, name)
    before = driver.engine.stats()
    assert before.num_waiting == 4
    driver.run()
    after = driver.engine.stats()
    assert (after.num_running, after.num_waiting, after.kv_cache_usage) == (0, 0, 0.0)
    assert after.adapter_loads_total == len(after.adapter_load_seconds) == 3
    assert after.adapters_by_state["active"] == 3
    assert sum(after.adapters_per_step.values()) == after.steps_total
    assert driver.engine.stats().adapters_per_step == {}
