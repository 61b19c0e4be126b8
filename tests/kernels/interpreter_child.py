# SPDX-License-Identifier: Apache-2.0
"""`interpreter_child.py OUT NODE_ID...`: runs the tests and writes their serialised reports to OUT, see conftest.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


class Recorder:
    def __init__(self) -> None:
        self.reports: dict[str, list[dict]] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.reports.setdefault(report.nodeid, []).append(data)


if __name__ == "__main__":
    out, *node_ids = sys.argv[1:]
    recorder = Recorder()
    # The cache belongs to the parent's run.
    exit_code = pytest.main(["-p", "no:cacheprovider", *node_ids], plugins=[recorder])
    if exit_code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        Path(out).write_text(json.dumps(recorder.reports))
    sys.exit(exit_code)
