# SPDX-License-Identifier: Apache-2.0
"""The example's adapters: a mixed batch, the same request alone, and transformers with peft say the same tokens."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.engine.engine import Engine
from multilora_backend.protocol import Outputs, Submit

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "examples/tiny"
sys.path.insert(0, str(ROOT / "examples"))
from tiny.tasks import BASE, TASKS, held_out_words  # noqa: E402

WORDS = held_out_words(8, seed=21)
GREEDY = SamplingParams(temperature=0.0, max_tokens=30)


def run(jobs: list[tuple[str, list[int]]]) -> list[list[int]]:
    """All jobs (adapter, prompt) in one engine at once; the output tokens of each."""
    engine = Engine(Config(model=str(TINY / "model"), adapters=str(TINY / "adapters"), device="cpu"), wake=lambda: None)
    for i, (name, prompt) in enumerate(jobs):
        engine.submit("front", Submit(i, prompt, GREEDY, "" if name == BASE else name))
    tokens: list[list[int]] = [[] for _ in jobs]
    while engine.scheduler.has_work:
        if not engine.step():
            time.sleep(0.001)
        for message in engine.take_replies().get("front", []):
            assert isinstance(message, Outputs), message
            for item in message.items:
                tokens[item.request_id] += item.token_ids
    engine.check_idle()
    engine.close()
    return tokens


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def mixed(tokenizer) -> dict[tuple[str, str], list[int]]:
    jobs = [(name, word) for word in WORDS for name in TASKS]
    outputs = run([(name, tokenizer(word)["input_ids"]) for name, word in jobs])
    return dict(zip(jobs, outputs, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_mixed_is_transformers_and_peft(name: str, mixed, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    if name != BASE:
        # Not under its own name: peft cannot load an adapter called "double", a method of torch's modules.
        model = peft.PeftModel.from_pretrained(model, str(TINY / "adapters" / name), adapter_name="example")
    model.eval()
    for word in WORDS:
        prompt = torch.tensor([tokenizer(word)["input_ids"]])
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30
            )
        assert mixed[name, word] == out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", TASKS)
def test_mixed_is_alone(name: str, mixed, tokenizer):
    [alone] = run([(name, tokenizer(WORDS[0])["input_ids"])])
    assert mixed[name, WORDS[0]] == alone
