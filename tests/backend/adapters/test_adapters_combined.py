# SPDX-License-Identifier: Apache-2.0
"""What cannot be had together is refused by name: sums and activated LoRA with more than A and B, or on experts."""

from __future__ import annotations

import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import extras_models
import tiny_models
from multilora_backend.adapters.composing import compose
from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.engine.engine import Engine
from multilora_backend.errors import MultiloraError
from multilora_backend.models.fusion import base_model, fuse
from multilora_backend.protocol import Failed, Outputs, Submit

FORMS = {"dora": {"use_dora": True}, "bias of B": {"lora_bias": True}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("combined")
    tiny_models.save_llama(root / "model")
    extras_models.save_trained(root / "model", root / "adapters" / "plain", 0, r=3)
    for seed, (name, form) in enumerate(FORMS.items(), 1):
        extras_models.save_trained(root / "model", root / "adapters" / name, seed, r=4, **form)
    return root


@pytest.fixture(scope="module")
def running(made: Path):
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    return fuse(model), base_model(model)


@pytest.mark.parametrize("form", FORMS)
def test_no_sum_loses_what_is_beside_a_and_b(form, made, running):
    sites, base = running
    read = [read_adapter(made / "adapters" / name, sites, torch.float32, base=base) for name in ("plain", form)]
    assert read[0].extras is None
    assert read[1].extras is not None
    with pytest.raises(MultiloraError, match=r"DoRA, trained biases, .* cannot be part of a sum"):
        compose([(weights, Decimal(1)) for weights in read], sites, torch.float32)


def test_no_sum_over_experts(made, running):
    sites, _ = running
    weights = read_adapter(made / "adapters" / "plain", sites, torch.float32)
    on_experts = [replace(site, experts=2) for site in sites]
    with pytest.raises(MultiloraError, match="on experts cannot be part of a sum"):
        compose([(weights, Decimal(2))], on_experts, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_a_request_for_such_a_sum_is_refused_at_once_and_nobody_else_is(form, made):
    engine = Engine(Config(model=str(made / "model"), adapters=str(made / "adapters"), device="cpu"), lambda: None)
    try:
        engine.adapters.check_all(wait_s=10)
        engine.step()
        sampling = SamplingParams(max_tokens=3, ignore_eos=True)
        for number, name in enumerate((f"plain:0.5,{form}:0.5", "plain", f"{form}:0.5", form)):
            engine.submit("t", Submit(number, [5, 6, 7], sampling, name))
        at_once = engine.take_replies()["t"]
        failed = {message.request_id: message.message for message in at_once if isinstance(message, Failed)}
        assert failed.keys() == {0, 2}, "before anything is read for them"
        ended = set()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if not engine.step():
                time.sleep(0.001)  # something is being read
            for message in engine.take_replies().get("t", ()):
                assert isinstance(message, Outputs)
                ended |= {item.request_id for item in message.items if item.finish_reason is not None}
            if len(ended) == 2:
                break
        assert ended == {1, 3}
        assert all("cannot be part of a sum" in message for message in failed.values())
    finally:
        engine.close()


@pytest.mark.parametrize("form", FORMS)
def test_activated_lora_with_more_than_a_and_b(form, made, running, tmp_path, change):
    sites, base = running
    folder = tmp_path / "activated"
    extras_models.save_trained(made / "model", folder, 7, r=4, **FORMS[form])
    change(folder, alora_invocation_tokens=[5])
    for read in (check_adapter, lambda *a, **more: read_adapter(a[0], a[1], torch.float32, **more)):
        with pytest.raises(MultiloraError, match=r"^alora_invocation_tokens: cannot be combined with DoRA"):
            read(folder, sites, base=base)
