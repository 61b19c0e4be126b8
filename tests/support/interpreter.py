# SPDX-License-Identifier: Apache-2.0
"""The process in which Triton's interpreter runs tests of kernels.

TRITON_INTERPRET must be set before triton is imported, and torch imports triton: in a run over all of tests/ it is too
late when a test's file is read, and set for good it would reach the servers that other tests start. So a test on the
interpreter runs in a child pytest that has the variable from its start, and its reports are passed on. Each process
that runs tests has one such child, started by the first test that needs it.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


class Interpreter:
    def __init__(self, script: Path, root: Path) -> None:
        """`script` with its folder's tests; `root` is where node ids begin."""
        self._pipe, its = multiprocessing.Pipe()
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        with its:
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(its.fileno()), str(script.parent)],
                cwd=root,
                env={**os.environ, "TRITON_INTERPRET": "1"},
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[its.fileno()],
            )

    def run(self, item: pytest.Item, following: pytest.Item | None) -> list[pytest.TestReport]:
        """`following`: the test that it will be asked for next, for which it keeps fixtures that both use."""
        try:
            self._pipe.send((item.nodeid, following and following.nodeid))
            answer = self._pipe.recv()
        except (OSError, EOFError):  # it has ended
            self._process.wait()
            self._output.seek(0)
            lost = f"the process that runs the interpreter ended with this test:\n{self._output.read()}"
            return [pytest.TestReport(item.nodeid, item.location, {}, "failed", lost, "call")]
        hook = item.config.hook
        return [hook.pytest_report_from_serializable(config=item.config, data=data) for data in answer]

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """It leaves when nobody can ask it any more."""
        self._pipe.close()
        self._process.wait()
        self._output.close()
