# SPDX-License-Identifier: Apache-2.0
"""The documents say what the code is: names, tables, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from multilora_backend.cli import config_reference
from multilora_backend.frontend.sampling import SCALARS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def test_the_configuration_table_is_the_code():
    between = re.search(r"<!-- config: `multilora config` -->\n(.*)\n<!-- /config -->", README, re.DOTALL)
    assert between, "the markers are gone"
    assert between[1].strip() == config_reference().strip(), "paste the output of `multilora config`"


@pytest.mark.parametrize("name", [*SCALARS, "stop", "stop_token_ids", "logit_bias", "request_priority", "tenant"])
def test_every_sampling_parameter_is_documented(name: str):
    assert f"`{name}`" in README


@pytest.mark.parametrize("path", re.findall(r"`([a-z_]+/[a-z_/0-9]+\.py)`", ARCHITECTURE))
def test_the_architecture_names_files_that_exist(path: str):
    assert (ROOT / path).exists() or (ROOT / "backend/multilora_backend" / path).exists()


def test_the_architecture_names_every_package():
    for folder in sorted((ROOT / "backend/multilora_backend").iterdir()):
        if (folder / "__init__.py").exists():
            assert f"`multilora_backend.{folder.name}`" in ARCHITECTURE


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "docs/performance.md"])
def test_links_lead_somewhere(document: str):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_triton_model_is_thin():
    lines = (ROOT / "model_repository/multilora/1/model.py").read_text().splitlines()
    assert len(lines) <= 150
