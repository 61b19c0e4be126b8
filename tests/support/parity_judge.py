# SPDX-License-Identifier: Apache-2.0
"""What transformers and peft compute from the folders that the engine reads: the truth of the parity suite."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor

import parity_recipes
from parity_answer import Answer, stacked
from parity_case import Case
from parity_recipes import NEIGHBOURS

BAR = 1e-4
"""Largest error of a logit, relative to the largest logit of the request."""


class ParityJudge:
    def __init__(self, base: Any, adapters: Path) -> None:
        self._base, self._adapters = base, adapters
        self._neighbours: dict[str, Any] = {"": base}

    def model_of(self, case: Case) -> Any:
        """PEFT's model with the adapter of the case, or the sum of those of its parts."""
        base = copy.deepcopy(self._base)
        if case.vocabulary:
            base = parity_recipes.resized(self._base, case.vocabulary)
        model = self._load(base, case.parts[0][0] if case.parts else case.name)
        for number, (name, _) in enumerate(case.parts[1:]):
            model.load_adapter(str(self._adapters / name), f"part{number}")
        if case.parts:
            names, weights = list(model.peft_config), [weight for _, weight in case.parts]
            model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
            model.set_adapter("sum")
        return model

    def neighbour(self, name: str) -> Any:
        assert name in ("", *NEIGHBOURS)
        if name not in self._neighbours:
            self._neighbours[name] = self._load(copy.deepcopy(self._base), name)
        return self._neighbours[name]

    def _load(self, base: Any, name: str) -> Any:
        return peft.PeftModel.from_pretrained(base, str(self._adapters / name), autocast_adapter_dtype=False).eval()

    @torch.inference_mode()
    def truth(self, answer: Answer, model: Any) -> Tensor:
        """[tokens but the last, vocabulary]: what `model` makes of the prompt and the tokens that were drawn."""
        tokens, more = [*answer.prompt, *answer.token_ids][:-1], {}
        config, name = getattr(model, "peft_config", {}), getattr(model, "active_adapter", "")
        if name in config and getattr(config[name], "alora_invocation_tokens", None):
            (offset,) = calculate_alora_offsets(config, name, torch.tensor([answer.prompt]))
            more["alora_offsets"] = [None if offset is None else offset + len(answer.token_ids) - 1]
        return model(input_ids=torch.tensor([tokens]), use_cache=False, **more).logits[0].float()

    def effect(self, answer: Answer, truth: Tensor) -> float:
        """How far the adapter moves the logits, relative to the largest; 1 where the base lacks tokens."""
        if max(answer.prompt + answer.token_ids) >= self._base.config.vocab_size:
            return 1.0
        plain = self.truth(answer, self._base)
        both = min(truth.shape[1], plain.shape[1])
        return float((truth[:, :both] - plain[:, :both]).abs().max() / truth.abs().max())


def check(answer: Answer, truth: Tensor) -> None:
    """Raises AssertionError unless logits are within BAR of `truth`, and tokens the same.

    Columns of tokens that the adapter does not know must be minus infinity.
    """
    assert not answer.failed
    first = len(answer.prompt) - 1
    _check_close(stacked(answer.sampled), truth[first:])
    if answer.every:
        assert sorted(answer.every) == list(range(len(truth))), "prefill, its chunks, and decode"
        _check_close(stacked([answer.every[i] for i in range(len(truth))]), truth)
    assert answer.token_ids == truth[first:].argmax(dim=1).tolist()


def _check_close(logits: Tensor, truth: Tensor) -> None:
    known = truth.shape[1]
    assert logits.shape[1] >= known
    assert (logits[:, known:] == -torch.inf).all(), "tokens that nobody knows"
    error = (logits[:, :known] - truth).abs().max() / truth.abs().max()
    assert error <= BAR
