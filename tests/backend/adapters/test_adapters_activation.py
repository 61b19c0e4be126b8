# SPDX-License-Identifier: Apache-2.0
"""Where an activated LoRA begins to act: PEFT's own answer, for any prompt."""

from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets

from multilora_backend.adapters.activation import NEVER, first_active
from multilora_backend.adapters.composing import compose
from multilora_backend.adapters.peft import read_adapter
from multilora_backend.errors import MultiloraError

tokens = st.lists(st.sampled_from([0, 1, 256, 2**16]), min_size=1, max_size=24)


@given(tokens, st.lists(st.sampled_from([0, 1, 256, 2**16]), min_size=1, max_size=3))
@example([1, 256, 0, 65536], [1])
@example([256, 1], [1])
def test_it_is_pefts_offset(prompt, invocation):
    config = {"x": SimpleNamespace(alora_invocation_tokens=invocation)}
    (offset,) = calculate_alora_offsets(config, "x", torch.tensor([prompt]))
    assert first_active(prompt, invocation) == (NEVER if offset is None else len(prompt) - offset)


def test_a_plain_lora_acts_everywhere():
    assert first_active([5, 6], ()) == 0


def test_it_is_read_and_is_no_part_of_a_sum(save, sites):
    plain, activated = save("plain"), save("activated", alora_invocation_tokens=[7, 9], task_type="CAUSAL_LM")
    read = [read_adapter(folder, sites, torch.float32) for folder in (plain, activated)]
    assert [weights.invocation for weights in read] == [(), (7, 9)]
    assert read[0].version != read[1].version
    with pytest.raises(MultiloraError, match="alora_invocation_tokens cannot be part of a sum"):
        compose([(weights, Decimal(1)) for weights in read], sites, torch.float32)


@pytest.mark.parametrize("value", [[-1], [2**31], ["a"], [True], "hello", 5, [1] * 1025, {"a": 1}])
def test_refused(save, change, sites, value):
    folder = change(save(), alora_invocation_tokens=value)
    with pytest.raises(MultiloraError, match="alora_invocation_tokens: must be a list of at most 1024 token ids"):
        read_adapter(folder, sites, torch.float32)


def test_an_empty_list_is_off(save, change, sites):
    assert read_adapter(change(save(), alora_invocation_tokens=[]), sites, torch.float32).invocation == ()
