# SPDX-License-Identifier: Apache-2.0
"""`interpreter_child.py PIPE FOLDER`: runs those of a folder's tests that it is told to, one by one.

Asked with the node ids of a test and of the next one, it answers with the test's serialised reports.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from multiprocessing.connection import Connection

import pytest


class Runner:
    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.reports: list[dict] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        with suppress(EOFError):  # nobody can ask any more
            while True:
                name, following = self.pipe.recv()
                self.reports = []
                self.config.hook.pytest_runtest_protocol(item=items[name], nextitem=items.get(following))
                self.pipe.send(self.reports)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


if __name__ == "__main__":
    descriptor, folder = sys.argv[1:]
    # The cache belongs to the parent's run.
    sys.exit(pytest.main(["-p", "no:cacheprovider", folder], plugins=[Runner(Connection(int(descriptor)))]))
