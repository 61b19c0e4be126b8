# SPDX-License-Identifier: Apache-2.0
"""An engine that serves every case's adapter of one model, in batches with others and alone, and what it said."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import peft
import torch

import parity_recipes
from every_row import EveryRow
from extras_models import TOKENS, driver_of
from parity_answer import Answer, answer_of
from parity_case import Case
from parity_families import Family, save_base
from parity_judge import ParityJudge
from parity_recipes import NEIGHBOURS

BATCH = 16
"""Sequences at a time, and rows of a step: longer prompts come in chunks, and decodes take their share of a step."""
STRIDE = 7
"""Cases that are so far apart share a batch, so that kinds of adapters mix."""
LENGTHS = (9, 37, 4, 6, 21, 2, 5, 1)
LOW, HIGH = 3, 50
"""Tokens of prompts, below what cases insert."""


class ParityBench:
    def __init__(self, family: Family, root: Path, cases: Sequence[Case]) -> None:
        self.family, self.root = family, root
        self.base = save_base(family, root / "model")
        parity_recipes.save_neighbours(family, self.base, root / "adapters")
        for seed, case in enumerate(cases):
            parity_recipes.save(case, family, self.base, root / "adapters", seed)
        self.driver = driver_of(
            root,
            "grouped",
            max_num_seqs=BATCH,
            max_num_batched_tokens=BATCH,
            adapter_device_bytes=2**24,
            adapter_extras_bytes=2**23,
            adapters_watch_s=0,
        )
        self.judge = ParityJudge(self.base, root / "adapters")
        self.prompts = {case.name: _prompts(case, index) for index, case in enumerate(cases)}
        self.together: dict[str, list[Answer]] = {}
        """By case."""
        self.neighbours: list[Answer] = []
        self._run_together([case for case in cases if case.verdict(family) == "applied"])

    def alone(self, answer: Answer, again: int = 24) -> Answer:
        """Its prompt and `again` of its output tokens as a prompt, and the rest of its tokens, with nobody beside."""
        prompt = [*answer.prompt, *answer.token_ids[:again]]
        (alone,) = self.ask((answer.asked, prompt), every=True, tokens=TOKENS - again)
        return alone

    def ask(self, *jobs: tuple[str, list[int]], every: bool = False, tokens: int = TOKENS) -> list[Answer]:
        """Adapter and prompt of each; all of them at once, to the end."""
        driver, rows = self.driver.clear(), EveryRow(self.driver, every)
        driver.failed.clear()
        numbers = [driver.submit(prompt, asked, max_tokens=tokens) for asked, prompt in jobs]
        driver.settle()
        answers = [answer_of(driver.requests[number]) for number in numbers]
        for number, failed in driver.failed.items():
            answers[number].failed = failed.message
        rows.stop()
        for number, answer in enumerate(answers):
            answer.every = rows.rows[number]
            mine = [step for step in rows.steps if number in step]
            answer.chunks = len(mine) - len(answer.token_ids) + 1
            answer.beside = {jobs[other][0] for step in mine for other in step if other != number}
        return answers

    def said(self, case: Case) -> set[str]:
        """Fields that the config of its adapter sets, to something else than PEFT's default."""
        config = json.loads((self.root / "adapters" / case.name / "adapter_config.json").read_text())
        defaults = peft.LoraConfig().to_dict()
        return {name for name, value in config.items() if value != defaults.get(name)}

    def _run_together(self, cases: list[Case]) -> None:
        jobs = [(case, prompt) for case in cases for prompt in self.prompts[case.name]]
        jobs = [job for start in range(STRIDE) for job in jobs[start::STRIDE]]
        # On the device before they are asked for, so that what shares a batch does not depend on how long a load takes.
        everybody = [*NEIGHBOURS, *(case.asked for case in cases)]
        self.ask(*((name, [LOW]) for name in everybody), tokens=1)
        beside = ["", *NEIGHBOURS]
        batches = math.ceil(len(jobs) / (BATCH - len(beside)))
        size = math.ceil(len(jobs) / batches)  # all alike, so that none has a few cases only
        for start in range(0, len(jobs), size):
            group = jobs[start : start + size]
            others = [(name, _tokens(5 + 6 * i, start + i)) for i, name in enumerate(beside)]
            asked = [(case.asked, prompt) for case, prompt in group]
            # In the middle, so that those who come first and those who come last are served beside them.
            middle = len(group) // 2
            answers = self.ask(*asked[:middle], *others, *asked[middle:])
            self.neighbours += answers[middle : middle + len(others)]
            own = answers[:middle] + answers[middle + len(others) :]
            for (case, _), answer in zip(group, own, strict=True):
                self.together.setdefault(case.name, []).append(answer)

    def close(self) -> None:
        self.driver.engine.close()


def _prompts(case: Case, index: int) -> list[list[int]]:
    """One for each of the case's insertions."""
    prompts = []
    for number, insert in enumerate(case.inserts):
        tokens = _tokens(LENGTHS[(index + number) % len(LENGTHS)], 31 * index + number)
        middle = len(tokens) // 2
        prompts.append([*tokens[:middle], *insert, *tokens[middle:]])
    return prompts


def _tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(LOW, HIGH, (count,), generator=generator).tolist()
