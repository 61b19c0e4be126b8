# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import os
import signal
from typing import Any

# Before torch is imported. Two processes run tests side by side on two cores, and threads that wait for each other on
# cores that are taken cost three times what they save. What tests start inherits it; an engine sets its own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from profiles import load_profile

load_profile()

ON_THE_SHARED_SERVER = {
    f"tests/e2e/test_e2e_{name}.py" for name in ("answers", "clients", "compositions", "errors", "readme")
}

# `make test &` in a script starts with SIGINT ignored, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What stays together under `-n 2 --dist loadscope`: what shares a server or a file's fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, test = nodeid.partition("::")
            if path in ON_THE_SHARED_SERVER:
                return "the shared server"
            # Kernels have no costly fixtures, so they are small change for the end, when one process has nothing left.
            return f"{path}::{test.partition('[')[0]}" if path.startswith("tests/kernels/") else path

    return Shares(config, log) if config.getvalue("dist") == "loadscope" else None
