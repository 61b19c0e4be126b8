# SPDX-License-Identifier: Apache-2.0
"""`make demo` says what it should, and leaves nothing behind, also when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = f"MULTI_DEMO_TEST={os.getpid()}"


def start() -> subprocess.Popen:
    key, _, value = MARK.partition("=")
    return subprocess.Popen(
        [sys.executable, "examples/demo.py"],
        cwd=ROOT,
        env={**os.environ, key: value, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def alive() -> list[str]:
    """Command lines of everything that the demo started, by an environment variable that its children inherit."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and MARK.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has ended, or is not ours
    return [command for command in found if command]


def test_every_answer_is_right_and_all_adapters_share_a_step():
    demo = start()
    out, _ = demo.communicate(timeout=100)
    assert demo.returncode == 0, out
    assert "largest number of different adapters in one step: 6 of 6" in out
    assert "224 answers right, 0 wrong" in out
    assert alive() == []


def test_ctrl_c_leaves_nothing():
    demo = start()
    for line in demo.stdout:
        if "is ready" in line:
            break
    assert len(alive()) >= 4, "the demo, tritonserver, its stub and the engine"
    time.sleep(0.3)
    demo.send_signal(signal.SIGINT)
    assert demo.wait(30) == 130
    assert alive() == []
