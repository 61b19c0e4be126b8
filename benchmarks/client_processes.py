# SPDX-License-Identifier: Apache-2.0
"""The processes around a measured server: streaming clients on their interpreter, and how much CPU everybody uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from report import ROOT
from traffic import Record, Traffic


class Clients:
    """Client processes, started for each traffic; they begin together."""

    def __init__(self, url: str, processes: int, timeout_s: float) -> None:
        self._url = url
        self._processes = processes
        self._timeout_s = timeout_s

    def run(self, traffic: Traffic) -> list[Record]:
        """Raises RuntimeError with the client's own words if one fails."""
        with ExitStack() as stack:
            clients = [stack.enter_context(self._start(part)) for part in traffic.split(self._processes)]
            try:
                for client in clients:
                    self._line(client, "ready")
                for client in clients:
                    self._write(client, "go")
                lines = [self._line(client) for client in clients]
            except BaseException:  # also Ctrl-C: none of them may go on
                for client in clients:
                    client.kill()
                raise
        return [Record(**record) for line in lines for record in json.loads(line)]

    def _start(self, traffic: Traffic) -> subprocess.Popen[str]:
        command = [stub_python() or sys.executable, str(Path(__file__).with_name("stream_client.py"))]
        path = os.pathsep.join([str(ROOT / "client"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = {**os.environ, "PYTHONPATH": path}
        client = subprocess.Popen(command, text=True, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._write(client, json.dumps({**asdict(traffic), "url": self._url, "timeout_s": self._timeout_s}))
        return client

    @staticmethod
    def _write(client: subprocess.Popen[str], line: str) -> None:
        assert client.stdin is not None
        client.stdin.write(line + "\n")
        client.stdin.flush()

    @staticmethod
    def _line(client: subprocess.Popen[str], expected: str = "") -> str:
        assert client.stdout is not None
        line = client.stdout.readline().strip()
        if not line or (expected and line != expected):
            raise RuntimeError(f"a client process ended: {line or 'its error is above'}")
        return line


def cpu_seconds(pids: Sequence[int], before: Mapping[str, float] | None = None) -> dict[str, float]:
    """CPU time by kind of process, less `before`: which of them is the bottleneck."""
    found: dict[str, float] = {}
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # just ended
            continue
        kind = Path(words[0]).name.removeprefix("triton_python_backend_")
        kind = "engine" if "multilora_backend.engine" in words else kind
        found[kind] = found.get(kind, 0.0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return {kind: spent - (before or {}).get(kind, 0.0) for kind, spent in found.items()}


def stub_python() -> str:
    home = os.environ.get("TRITON_STUB_ENV", "")
    return str(Path(home, "bin", "python3")) if home else ""


def check_interpreters() -> str:
    """What to do before this can run; empty if nothing. Asked first: the engine's part alone takes a minute."""
    folders = " ".join(str(ROOT / name) for name in ("backend", "kernels", "client"))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = stub_python()
    if python and subprocess.run([python, "-c", "import multilora_backend"], env=clean, capture_output=True).returncode:
        site = '"$("$TRITON_STUB_ENV"/bin/python3 -c "import sysconfig; print(sysconfig.get_path(\'purelib\'))")"'
        return (
            "the front end's interpreter cannot import multilora_backend (it ignores PYTHONPATH); for it:\n"
            f"printf '%s\\n' {folders} > {site}/multilora.pth"
        )
    python = python or sys.executable
    imports = subprocess.run([python, "-c", "import tritonclient.grpc"], capture_output=True, text=True)
    return f"{python} cannot run the clients: {imports.stderr.strip()}" if imports.returncode else ""
