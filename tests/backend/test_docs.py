# SPDX-License-Identifier: Apache-2.0
"""The documents say what the code is: names, tables, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

import multilora_kernels
from multilora_backend import cli
from multilora_backend.adapters.base_files import base_fingerprint
from multilora_backend.adapters.border import TIERS
from multilora_backend.adapters.lineage import FINGERPRINT
from multilora_backend.adapters.peft_fields import CONVERTED_INITS
from multilora_backend.config_reference import config_reference
from multilora_backend.frontend.sampling import SCALARS
from multilora_backend.frontend.series import SERIES, reference
from multilora_backend.models.flashinfer_attention import HEAD_DIMS
from multilora_backend.models.loader import STATIC_ROPE, SUPPORTED
from multilora_backend.models.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "docs/architecture.md", "docs/metrics.md", "docs/peft-support.md", "docs/performance.md"]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
ADAPTERS = (ROOT / "docs/adapters.md").read_text()
METRICS = (ROOT / "docs/metrics.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
KERNELS = [name.removesuffix("_reference") for name in multilora_kernels.__all__ if name.endswith("_reference")]


def test_the_configuration_table_is_the_code():
    between = re.search(r"<!-- config: `multilora config` -->\n(.*)\n<!-- /config -->", README, re.DOTALL)
    assert between, "the markers are gone"
    assert between[1].strip() == config_reference().strip(), "paste the output of `multilora config`"


def test_the_table_of_metrics_is_the_code():
    between = re.search(r"<!-- metrics: `multilora metrics` -->\n(.*)\n<!-- /metrics -->", METRICS, re.DOTALL)
    assert between, "the markers are gone"
    assert between[1].strip() == reference().strip(), "paste the output of `multilora metrics`"


@pytest.mark.parametrize("command", re.findall(r"^\$ multilora (inspect .*)$", ADAPTERS, re.MULTILINE))
def test_what_inspect_prints_is_what_is_documented(command, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(command.split()) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    documented = ADAPTERS.partition(f"$ multilora {command}\n")[2].partition("\n```")[0]
    assert documented.strip() == printed.strip(), "paste the output"


def test_what_is_said_of_the_base_model_is_the_code():
    table = ADAPTERS.partition("### Which base model")[2].partition("###")[0]
    assert f"`{FINGERPRINT}`" in table
    example = re.search(r'"base_model_fingerprint": "([0-9a-f]+)\.\.\."', table)
    assert example
    assert base_fingerprint(ROOT / "examples/tiny/model").startswith(example[1])
    assert all(f"`{name}_init`" in ADAPTERS for name in CONVERTED_INITS)


def test_every_series_that_is_named_exists():
    for document in (METRICS, README, ARCHITECTURE):
        named = set(re.findall(r"`((?:vllm|multilora):[a-z0-9_]+)", document))
        assert named <= set(SERIES)


@pytest.mark.parametrize("name", [*SCALARS, "stop", "stop_token_ids", "logit_bias", "request_priority", "tenant"])
def test_every_sampling_parameter_is_documented(name: str):
    assert f"`{name}`" in README


@pytest.mark.parametrize("name", [*SUPPORTED, *STATIC_ROPE, *STRATEGIES])
def test_every_model_rope_and_strategy_is_in_the_readme(name: str):
    assert f"`{name}`" in README


def test_the_limits_are_those_of_the_code():
    assert f"more than {TIERS[-1]:,} ranks together" in README
    assert "heads are not of {}, {} or {}".format(*HEAD_DIMS) in README
    assert "covers 0, {}, {}, {}, {} or {:,} ranks".format(*TIERS) in ARCHITECTURE


def test_the_extras_that_are_named_exist():
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"\.\[([a-z,]+)\]'", README)
    assert named
    for extra in ",".join(named).split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_make_targets_that_are_named_exist(document: str):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE))
    assert named <= targets


def test_every_script_that_make_runs_exists():
    scripts = re.findall(r"(?:benchmarks|examples|scripts)/\w+\.(?:py|sh)", MAKEFILE)
    assert "benchmarks/engine.py" in scripts
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_setup_installs_a_flashinfer_that_the_extra_allows():
    pinned = re.search(r"flashinfer-python==(\S+)", (ROOT / "scripts/setup.sh").read_text())
    allowed = re.search(r'"flashinfer-python(.+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned
    assert allowed
    assert SpecifierSet(allowed[1]).contains(pinned[1])


@pytest.mark.parametrize("name", KERNELS)
def test_the_architecture_names_every_kernel(name: str):
    assert name in ARCHITECTURE


@pytest.mark.parametrize("path", re.findall(r"`([a-z_]+/[a-z_/0-9]+\.py)`", ARCHITECTURE))
def test_the_architecture_names_files_that_exist(path: str):
    assert (ROOT / path).exists() or (ROOT / "backend/multilora_backend" / path).exists()


def test_the_architecture_names_every_package():
    for folder in sorted((ROOT / "backend/multilora_backend").iterdir()):
        if (folder / "__init__.py").exists():
            assert f"`multilora_backend.{folder.name}`" in ARCHITECTURE


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_triton_model_is_thin():
    lines = (ROOT / "model_repository/multilora/1/model.py").read_text().splitlines()
    assert len(lines) <= 150
