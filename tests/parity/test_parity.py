# SPDX-License-Identifier: Apache-2.0
"""Every field of peft.LoraConfig on every supported model: the logits and tokens of transformers with peft, or refused.

The table of cases is in tests/support/parity_*.py, and docs/peft-support.md shows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import peft
import pytest
import torch

from extras_models import TOKENS
from parity_bench import ParityBench
from parity_case import Case
from parity_families import FAMILIES, Family
from parity_judge import check
from parity_matrix import CASES, cells
from parity_recipes import NEIGHBOURS

Benches = Callable[[Family], ParityBench]
LORA_CONFIG = {field.name for field in dataclasses.fields(peft.LoraConfig)}
NEVER_SET = {"runtime_config", "peft_type", "peft_version"}
"""PEFT does not write the first, and the others are always the same."""


def params(verdict: str) -> list:
    return [pytest.param(family, case, id=f"{family.model_type}-{case.name}") for family, case in cells(verdict)]


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Benches]:
    """One for each model, made when it is first asked for, with one thread: for tensors this small more cost time."""
    made: dict[str, ParityBench] = {}
    failed: dict[str, Exception] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def bench(family: Family) -> ParityBench:
        name = family.model_type
        if name in failed:  # for a hundred tests it is tried once
            raise failed[name]
        if name not in made:
            try:
                made[name] = ParityBench(family, tmp_path_factory.mktemp(name), CASES)
            except Exception as error:
                failed[name] = error
                raise
        return made[name]

    yield bench
    for one in made.values():
        one.close()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("family", "case"), params("applied"))
def test_applied(family: Family, case: Case, benches: Benches):
    bench = benches(family)
    judge, model, effects = bench.judge, bench.judge.model_of(case), []
    for answer in bench.together[case.name]:
        truth = judge.truth(answer, model)
        check(answer, truth)
        assert len(answer.token_ids) == TOKENS
        assert answer.beside >= {"", *NEIGHBOURS}
        assert len(answer.beside) > 5, "and others"
        # What an activated adapter's outputs hold must not become a prompt: its tokens would be looked for there.
        alone = bench.alone(answer, again=0 if "alora_invocation_tokens" in case.covers else 24)
        assert alone.prompt + alone.token_ids == answer.prompt + answer.token_ids
        check(alone, truth)
        effects.append(judge.effect(answer, truth))
    assert max(effects) > 0.01, "or this would show nothing"
    if not case.parts:
        converted = {"init_lora_weights"} if case.recipe == "converted" else set()
        assert case.covers & LORA_CONFIG - NEVER_SET - converted <= bench.said(case), "or this would be of no field"


@pytest.mark.parametrize(("family", "case"), params("refused"))
def test_refused(family: Family, case: Case, benches: Benches):
    (answer,) = benches(family).ask((case.asked, [5, 6, 7]))
    assert case.refused in answer.failed
    fields = case.covers & LORA_CONFIG
    assert not fields or any(f"{field}: " in answer.failed for field in fields), "named"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_neighbours(family: Family, benches: Benches):
    """Those that every batch has are served right as well, beside all others."""
    bench = benches(family)
    for answer in bench.neighbours:
        check(answer, bench.judge.truth(answer, bench.judge.neighbour(answer.asked)))
    assert max(answer.chunks for answer in bench.neighbours) > 2, "prompts are cut"
