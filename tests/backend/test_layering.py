# SPDX-License-Identifier: Apache-2.0
"""Imports run one way, packages have no cycles, and the light packages stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    **dict.fromkeys((ROOT / "backend").rglob("*.py"), "multilora_backend"),
    **dict.fromkeys((ROOT / "kernels").rglob("*.py"), "multilora_kernels"),
    **dict.fromkeys((ROOT / "client").rglob("*.py"), "multilora_client"),
}
BASE = {"added_tokens", "composition", "core", "documents", "errors", "config", "protocol"}
ALLOWED = {  # package -> our packages that it may import
    "added_tokens": {"errors"},
    "core": set(),
    "documents": set(),
    "errors": set(),
    "composition": {"errors"},
    "config": {"errors"},
    "protocol": {"added_tokens", "core", "errors"},
    "processes": set(),
    "frontend": {*BASE, "processes", "tritonserver"},
    "adapters": {*BASE},
    "scheduling": {*BASE, "adapters"},
    "models": {*BASE, "adapters", "scheduling", "multilora_kernels"},
    "engine": {*BASE, "adapters", "scheduling", "models", "processes", "multilora_kernels"},
    "planning": {"core", "errors", "config", "adapters", "models", "engine"},
    "tritonserver": {"errors"},
    "launch_arguments": {"errors", "config"},
    "launcher": {"errors", "config", "tritonserver", "launch_arguments"},
    "config_reference": {"config"},
    "cli": {"errors", "config", "config_reference", "launcher", "frontend", "planning"},
    "multilora_kernels": set(),
    "multilora_client": set(),
}


def package_of(module: str) -> str | None:
    """`multilora_backend.engine.server` -> `engine`; other top-level modules of ours are packages of their own."""
    top, _, rest = module.partition(".")
    if top == "multilora_backend":
        return rest.split(".")[0] or None
    return top if top in ("multilora_kernels", "multilora_client") else None


def imports(path: Path) -> set[str]:
    """Packages of ours that a file imports at run time; `if TYPE_CHECKING:` does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{a.name}" if node.module == "multilora_backend" else node.module for a in node.names
            ]
        else:
            continue
        found |= {package for name in names if (package := package_of(name))}
    return found


@pytest.mark.parametrize("path", sorted(SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path):
    top = SOURCES[path]
    if top == "multilora_backend":
        relative = path.relative_to(ROOT / "backend/multilora_backend")
        package = relative.parts[0].removesuffix(".py")
        if package == "__init__":
            return
    else:
        package = top
    assert imports(path) - {package} <= ALLOWED[package]


def test_the_top_folders_are_no_packages():
    """A module called `kernels` would shadow Hugging Face's."""
    assert [f for f in ("kernels", "backend", "client") if (ROOT / f / "__init__.py").exists()] == []
    code = (
        "import transformers.models.llama.modeling_llama\n"
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "c = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)\n"
        "try: AutoModelForCausalLM.from_config(c, attn_implementation='flash_attention_2')\n"
        "except ImportError as e: print(e)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", sorted(SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_its_license(path: Path):
    assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
