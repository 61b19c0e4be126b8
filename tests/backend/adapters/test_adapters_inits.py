# SPDX-License-Identifier: Apache-2.0
"""Initialisations that take A and B out of the base model's weights: served when PEFT has converted them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from initial_adapters import INITS, train
from multilora_backend.adapters.peft import read_adapter
from multilora_backend.adapters.ranks import padded
from multilora_backend.errors import MultiloraError

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", INITS)
def test_what_peft_converts_is_served_and_what_it_does_not_is_refused(name, sites, llama, tmp_path: Path):
    original = dict(llama.named_modules())
    model = train(name, llama, tmp_path)
    with pytest.raises(MultiloraError, match=r"^init_lora_weights: .* changes the base model's weights; convert"):
        read_adapter(tmp_path / "raw", sites, torch.float32)
    weights = read_adapter(tmp_path / "done", sites, torch.float32)
    assert weights.rank == 8, "twice its own"
    for index, site in enumerate(sites):
        own = weights.sites[index]
        if own is None:
            continue
        deltas = own.a.view(len(site.modules), padded(weights.rank), -1)
        for module, a, b in zip(site.modules, deltas, own.b.split(site.out_features, 1), strict=True):
            if module.endswith(("up_proj", "o_proj")):
                trained = model.base_model.model.get_submodule(module)
                expected = trained.base_layer.weight + trained.get_delta_weight("default")
                ours = original[module].weight + b.T @ a
                # The residual and A B were rounded apart from each other when they were taken from the weight.
                assert (ours - expected).abs().max() <= 64 * EPS * expected.abs().max(), module
