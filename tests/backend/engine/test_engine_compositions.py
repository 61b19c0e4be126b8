# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one request: the logits and tokens of PEFT's `add_weighted_adapter`, alone and in company."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

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
SUMS = {
    "a:0.7,b:0.3": {"a": 0.7, "b": 0.3},
    "b:-1.5,a:0.25,c:0.5": {"a": 0.25, "b": -1.5, "c": 0.5},
    "b:0.5": {"b": 0.5},
    "b:2,c:0": {"b": 2.0, "c": 0.0},
}
PROMPT = [5, 6, 7, 40, 3, 11, 29, 8, 60, 17, 23]
LONG = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_models.save_llama(root / "model")
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        tiny_models.save_adapter(root / "model", root / "adapters" / name, seed, **fields)
    return root


@pytest.fixture(scope="module")
def peft_model(folder: Path):
    """PEFT's model with an adapter for each of SUMS; give it a name, or "" for the base model."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").eval()
    model = None
    for name in ADAPTERS:
        place = str(folder / "adapters" / name)
        if model is None:
            model = peft.PeftModel.from_pretrained(base, place, adapter_name=name)
        else:
            model.load_adapter(place, adapter_name=name)
    for number, parts in enumerate(SUMS.values()):
        # c with rsLoRA never comes first: PEFT would take that over and scale the sum once more.
        model.add_weighted_adapter(list(parts), list(parts.values()), f"sum{number}", combination_type="cat")
    return model


def logits(model, asked: str, tokens: list[int]) -> torch.Tensor:
    if asked:
        model.set_adapter(f"sum{list(SUMS).index(asked)}" if asked in SUMS else asked)
    with torch.inference_mode():
        if asked:
            return model(input_ids=torch.tensor([tokens])).logits[0]
        with model.disable_adapter():
            return model(input_ids=torch.tensor([tokens])).logits[0]


@pytest.fixture
def lab(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    made = StepLab(folder / "model", tmp_path / "adapters")
    yield made
    made.close()


def close_to(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("asked", SUMS)
def test_alone_in_chunks_and_decode(lab, peft_model, asked: str):
    tokens = [*PROMPT, 4, 9]
    expected = logits(peft_model, asked, tokens)
    assert not close_to(expected, logits(peft_model, "", tokens)), "it does something"
    one = lab.sequence(asked, tokens)
    got = torch.cat([lab.logits((one, start, count)) for start, count in ((0, 5), (5, 6), (11, 1), (12, 1))])
    assert close_to(got, expected)
    assert close_to(lab.logits((lab.sequence(asked, tokens), 0, 13)), expected)


def test_mixed_with_adapters_and_the_base(lab, peft_model):
    asked = [*SUMS, "a", "", "c", "b"]
    tokens = [[*PROMPT[i:], *PROMPT[:i], 2 + i] for i in range(len(asked))]
    every = [lab.sequence(name, t) for name, t in zip(asked, tokens, strict=True)]
    steps = [lab.logits(*((s, 0, 3 + i % 4) for i, s in enumerate(every)))]
    steps.append(lab.logits(*((s, 3 + i % 4, 8 - i % 4) for i, s in enumerate(every))))
    steps.append(lab.logits(*((s, 11, 1) for s in every)))
    counts = [[3 + i % 4 for i in range(len(every))], [8 - i % 4 for i in range(len(every))], [1] * len(every)]
    rows = [step.split(count) for step, count in zip(steps, counts, strict=True)]
    for i, name in enumerate(asked):
        assert close_to(torch.cat([step[i] for step in rows]), logits(peft_model, name, tokens[i])), name


def test_the_same_tokens_as_peft(lab, peft_model):
    asked = [*SUMS, "a", "", "c", "b"]
    got = lab.greedy([(name, PROMPT) for name in asked], LONG)
    for name, tokens in zip(asked, got, strict=True):
        # Each is PEFT's choice after those before it, so all of them are what PEFT says by itself.
        choices = logits(peft_model, name, [*PROMPT, *tokens])[len(PROMPT) - 1 : -1].argmax(dim=-1)
        assert tokens == choices.tolist(), name
    for name, tokens in zip(SUMS, got, strict=False):
        assert lab.greedy([(name, PROMPT)], LONG) == [tokens], "alone, and with its prompt in the prefix cache"


def test_equal_sums_share_their_prefix_and_others_do_not(lab):
    long = [(7 * i) % 59 + 1 for i in range(40)]
    lab.greedy([("a:0.7,b:0.3", long)], 2)
    before = lab.engine.pages.hits
    lab.greedy([("b:0.3,a:0.7", long)], 2)
    assert lab.engine.pages.hits - before == 36, "all full pages but that of the last token"
    before = lab.engine.pages.hits
    lab.greedy([("a:0.7,b:0.4", long), ("a", long), ("", long), ("a:0.7", long)], 2)
    assert lab.engine.pages.hits == before


def test_nothing_left_is_the_base_model(lab):
    assert lab.greedy([("a:0,b:0", PROMPT)], 8) == lab.greedy([("", PROMPT)], 8)
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
