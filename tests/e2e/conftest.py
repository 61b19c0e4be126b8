# SPDX-License-Identifier: Apache-2.0
"""A real tritonserver with the example model, started once for all tests that do it no harm."""

from __future__ import annotations

import re
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from multilora_backend.launcher import TritonServer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
MODEL = ROOT / "examples/tiny/model"
ADAPTERS = ROOT / "examples/tiny/adapters"
START_S = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TritonServer]]:
    """Starts servers that are stopped at the end of the session, if not before."""
    started: list[TritonServer] = []

    def launch(**kwargs) -> TritonServer:
        place = tmp_path_factory.mktemp("server")
        log = place / "log.txt"
        options = {"model": MODEL, "adapters": ADAPTERS, "log": log, "drain_s": 1, **kwargs}
        # Not where it is by default, which is among the adapters of the examples.
        defaults = {"num_threads": 1, "adapter_state_file": place / "state.json"}
        options["settings"] = {**defaults, **options.get("settings", {})}
        started.append(TritonServer(**options))
        started[-1].wait_ready(START_S)
        return started[-1]

    yield launch
    with ThreadPoolExecutor() as pool:  # each takes seconds, in which it waits
        list(pool.map(TritonServer.stop, started))


@pytest.fixture(scope="session")
def server(launch: Callable[..., TritonServer]) -> TritonServer:
    return launch()


class Metrics:
    """Triton's metrics endpoint, parsed."""

    def __init__(self, server: TritonServer) -> None:
        self._url = f"http://{server.metrics}/metrics"

    def text(self) -> str:
        with urllib.request.urlopen(self._url, timeout=10) as response:
            return response.read().decode()

    def value(self, name: str, **labels: str) -> float:
        """The sum over all series of a name that have these labels; 0 if there is none."""
        total = 0.0
        for line in self.text().splitlines():
            match = re.fullmatch(r"([^{ ]+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name and all(f'{k}="{v}"' in (match[2] or "") for k, v in labels.items()):
                total += float(match[3])
        return total

    def settled(self, name: str, **labels: str) -> float:
        """A value that has not changed for a second: front ends report every quarter."""
        value, since = self.value(name, **labels), time.monotonic()
        while time.monotonic() - since < 1.0:
            time.sleep(0.1)
            if (now := self.value(name, **labels)) != value:
                value, since = now, time.monotonic()
        return value

    def wait(self, name: str, value: float, timeout: float = 10.0, **labels: str) -> None:
        deadline = time.monotonic() + timeout
        while (now := self.value(name, **labels)) != value:
            assert time.monotonic() < deadline, f"{name} is {now}, not {value}"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def metrics() -> type[Metrics]:
    return Metrics
