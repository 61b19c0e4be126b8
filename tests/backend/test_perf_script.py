# SPDX-License-Identifier: Apache-2.0
"""benchmarks/perf_analyzer.py with the real perf_analyzer and the stand-in model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPOSITORY = Path(__file__).parent / "stand_in_repository"


@pytest.fixture(scope="module", autouse=True)
def perf_analyzer() -> None:
    setup = subprocess.run([ROOT / "scripts" / "setup_perf.sh"], capture_output=True, text=True)
    if setup.returncode:
        pytest.skip(f"perf_analyzer cannot be set up: {setup.stderr.strip()}")


def script(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "perf_analyzer.py", "--repository", REPOSITORY]
    command += ["--model", tmp_path, "--adapters", tmp_path, "--concurrency", "2", "--seconds", "0.3", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)


@pytest.mark.e2e
def test_every_adapter_is_in_the_table(tmp_path: Path) -> None:
    done = script(tmp_path, "--names", "red,green")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.replace(" ", "").split("│")[1:3] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [name for name, _ in rows] == ["2", "(base)", "red", "green"]
    assert all(float(number) > 0 for _, number in rows)


@pytest.mark.e2e
def test_a_refused_request_fails_the_run_with_its_reason(tmp_path: Path) -> None:
    done = script(tmp_path, "--names", "red,unknown")
    assert done.returncode == 1
    assert "unknown: the stand-in has no such adapter" in done.stdout
