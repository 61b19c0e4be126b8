# SPDX-License-Identifier: Apache-2.0
"""Activated LoRA: the tokens of PEFT's generate, and K and V before the invocation shared with everybody.

PEFT's logits on every model are in tests/parity.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from step_lab import StepLab

INVOKE = {"act": (50, 51), "other": (51,), "plain": ()}
EARLY = [5, 6, 50, 51, 7, 40, 3, 11, 29, 8, 60, 17, 23]
LATE = [5, 50, 51, 50, 7, 40, 3, 11, 29, 50, 51, 17, 23]
NONE = [5, 50, 6, 51, 52, 40, 3, 11, 29, 8, 60, 17, 50]
LONG = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_models.save_llama(root / "model")
    for seed, (name, tokens) in enumerate(INVOKE.items()):
        more = {"alora_invocation_tokens": list(tokens)} if tokens else {}
        tiny_models.save_adapter(root / "model", root / "adapters" / name, seed, task_type="CAUSAL_LM", r=8, **more)
    return root


@pytest.fixture(scope="module")
def peft_models(folder: Path):
    """By name; "" is the base model."""
    models = {}
    for name in ("", *INVOKE):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").eval()
        place = str(folder / "adapters" / name)
        models[name] = peft.PeftModel.from_pretrained(base, place) if name else base
    return models


@pytest.fixture
def lab(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    made = StepLab(folder / "model", tmp_path / "adapters")
    yield made
    made.close()


def test_the_same_tokens_as_pefts_generate(lab, peft_models):
    asked = [(name, prompt) for prompt in (EARLY, LATE, NONE) for name in ("act", "other", "plain", "")]
    expected = []
    for name, prompt in asked:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = peft_models[name].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONG, min_new_tokens=LONG,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert lab.greedy(asked, LONG) == expected
    assert [lab.greedy([one], LONG)[0] for one in asked] == expected, "alone, with their prompts in the prefix cache"
    assert len({tuple(tokens) for tokens in expected}) >= 9, "act, other and the base are one without the invocation"


def test_what_is_before_the_invocation_is_shared(lab):
    """38 tokens, the invocation at 26: six pages of four are wholly before it, nine are full in all."""
    head = [(7 * i) % 49 + 1 for i in range(26)]
    prompt = [*head, 50, 51, *range(1, 11)]
    pages = lab.engine.pages

    def hits(name: str, tokens: list[int]) -> int:
        before = pages.hits
        lab.greedy([(name, tokens)], 2)
        return (pages.hits - before) // lab.page

    assert hits("", prompt) == 0
    assert hits("act", prompt) == 6, "the base model's"
    assert hits("other", prompt) == 6, "though it begins a token later"
    assert hits("act", prompt) == 9, "its own behind that"
    assert hits("plain", prompt) == 0, "which depends on its adapter from the start"
    assert hits("", [*prompt[:30], 3, 4]) == 7
    assert hits("act", [*prompt[:36], 50, 51, 1, 2, 3]) == 9, "all before the last invocation is the base model's"
    fresh = [3, *prompt]
    assert hits("act", fresh) == 0
    assert hits("", fresh) == 6, "and the base model finds what an adapter's request has left"
    lacking = [4, *head, *head[:10]]
    assert hits("act", lacking) == 0
    assert hits("", lacking) == hits("other", lacking) == 9
