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
from parity_matrix import CASES, cells
from parity_recipes import NEIGHBOURS

Benches = Callable[[Family], ParityBench]
LORA_CONFIG = {field.name for field in dataclasses.fields(peft.LoraConfig)}


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
    together, model = bench.together[case.name], bench.judge.model_of(case)
    for answer in together:
        bench.judge.check(answer, model)
        assert len(answer.token_ids) == TOKENS
        assert answer.beside >= {"", *NEIGHBOURS}
        assert len(answer.beside) > 5, "and others"
        # What an activated adapter's outputs hold must not become a prompt: its tokens would be looked for there.
        alone = bench.alone(answer, again=0 if "alora_invocation_tokens" in case.covers else 24)
        bench.judge.check(alone, model)
        assert (alone.prompt + alone.token_ids)[len(answer.prompt) :] == answer.token_ids
    assert max(bench.judge.effect(answer, model) for answer in together) > 0.01, "or this would show nothing"


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
        bench.judge.check(answer, bench.judge.neighbour(answer.asked))
    assert max(answer.chunks for answer in bench.neighbours) > 2, "prompts are cut"
