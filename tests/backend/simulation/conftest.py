# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from simulation_modules import simulation_modules


@pytest.fixture(scope="module")
def sim() -> Iterator[SimpleNamespace]:
    with simulation_modules() as modules:
        yield modules
