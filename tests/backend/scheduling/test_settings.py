# SPDX-License-Identifier: Apache-2.0
"""Settings: what is refused, that each strategy can be switched off, and that docs/scheduling.md tells the truth."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from multilora_backend.config import Config
from multilora_backend.errors import MultiloraError
from multilora_backend.scheduling.policy import STRATEGIES, Policy
from multilora_backend.scheduling.tenants import SlaClass, Tenant, Tenants

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = (ROOT / "docs/scheduling.md").read_text().partition("## Simulated")[0]
SETTINGS = (
    "strategies",
    "max_overtake_s",
    "tenure_s",
    "fair_input_weight",
    "fair_output_weight",
    "tenants",
    "tenant_header",
    "max_loras",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_host_bytes",
)


@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
@pytest.mark.parametrize("name", ["max_overtake_s", "tenure_s", "fair_input_weight", "fair_output_weight"])
def test_values_that_would_let_somebody_wait_for_ever_are_refused(name: str, value: str):
    with pytest.raises(MultiloraError, match=f"{name}: must be .*finite, got"):
        Config.from_mapping({name: value}, "test")


def test_tokens_that_count_nothing_at_all_are_refused():
    with pytest.raises(MultiloraError, match="fair_output_weight: must be above 0, or the other is"):
        Config(fair_input_weight=0.0, fair_output_weight=0.0)


def test_strategies_are_chosen_by_name():
    policy = Policy.from_config(Config(strategies=" fair_share, preload", tenure_s=3.0, fair_input_weight=0.5))
    assert (policy.adapter_first, policy.fair_share, policy.priority, policy.preload) == (False, True, False, True)
    assert (policy.tenure_s, policy.input_weight) == (3.0, 0.5)
    with pytest.raises(MultiloraError, match="strategies: unknown fairshare; known are adapter_first, fair_share"):
        Policy.from_config(Config(strategies="fairshare"))


def test_the_document_names_the_settings_and_their_defaults():
    assert all(f"`{name}`" in DOCUMENT for name in SETTINGS)
    defaults = Config()
    told = dict(re.findall(r"`(\w+)`[^`(]*\(default ([\d.]+|`[\w,]+`)", DOCUMENT))
    assert {"max_overtake_s", "tenure_s", "fair_input_weight", "fair_output_weight", "strategies"} <= set(told)
    for name, value in told.items():
        default = getattr(defaults, name)
        if name == "kv_host_bytes":
            default //= 2**30
        assert type(default)(value.strip("`")) == default, name
    assert all(f"`{name}`" in DOCUMENT for name in STRATEGIES)


def test_the_documents_tenants_are_a_file_that_uses_every_key():
    content = yaml.safe_load(re.search(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)[1])
    tenants = Tenants.parse(content)
    assert tenants.get("acme").sla == SlaClass("interactive", 8, 1.5)
    keys = {field.metadata.get("key", field.name) for field in dataclasses.fields(Tenant)} - {"name"}
    assert set().union(*content["tenants"].values(), content["default"]) == keys


def test_the_files_that_the_document_names_exist():
    tests = Path(__file__).parent
    named = set(re.findall(r"`([\w./]+\.py)`", DOCUMENT))
    package = ROOT / "backend/multilora_backend/scheduling"
    missing = [name for name in named if not (tests / name).exists() and not (package / name).exists()]
    assert len(named) > 15
    assert not missing
