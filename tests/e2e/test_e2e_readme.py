# SPDX-License-Identifier: Apache-2.0
"""The README's commands and programs, as printed, against the real server: only the ports are changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
CURL = [block for kind, block in BLOCKS if "curl" in block and not kind]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("multilora-client ")]
OPERATOR = [line for line in COMMANDS if line.startswith("multilora-client adapters ")]
CLIENT = [line for line in COMMANDS if line not in OPERATOR]


def here(text: str, server) -> str:
    return text.replace("localhost:8000", server.http).replace("localhost:8001", server.grpc)


def run(command: list[str], **kwargs) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    for block in (CURL[0], CURL[2], CURL[3]):
        command, printed = block.split("\n{", 1)
        assert json.loads(run(["bash", "-c", here(command, server)])) == json.loads("{" + printed)
    events = run(["bash", "-c", here(CURL[1], server)])
    texts = [json.loads(line[6:])["text_output"] for line in events.splitlines() if line.startswith("data: ")]
    assert "".join(texts) == "HELLO"
    assert len(CURL) == 4


@pytest.mark.parametrize(("number", "printed"), [(0, "olleh"), (1, "uryyb\nhheelllloo")])
def test_python(server, number: int, printed: str):
    assert run([sys.executable, "-c", here(PYTHON[number], server)]).strip() == printed
    assert len(PYTHON) == 2


@pytest.mark.parametrize("line", CLIENT)
def test_client_command(server, line: str):
    command = [sys.executable, "-m", "multilora_client.cli", *line.split()[1:], "--url", server.grpc]
    out = run(command)
    assert ("HELLO" in out) == ("upper" in line)


def test_operators_commands(server):
    """In their order: some need what others have done."""
    out = {}
    for line in OPERATOR:
        command = [sys.executable, "-m", "multilora_client.cli", *line.split()[1:], "--url", server.grpc]
        out[line.split()[2]] = run(command)
    assert all(name in out["list"] for name in ("upper", "sort"))
    assert '"upper"' in out["show"]
    assert "pinned" in out["pin"]
    assert "pinned" not in out["unpin"]


@pytest.mark.parametrize("name", ["client_sync.py", "client_async.py"])
def test_examples(server, name: str):
    source = here((ROOT / "examples" / name).read_text(), server)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    assert run([sys.executable, "-c", source, server.grpc], env=environment).strip()
