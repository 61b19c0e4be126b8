# SPDX-License-Identifier: Apache-2.0
"""How many examples Hypothesis draws where a property's cost or subtlety asks for a number of its own."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
"""`quick` has the same examples every time, so that a change is told apart from luck; `thorough` has others each time
and many more."""
_TIMES = {"quick": 1, "thorough": 10}


def examples(count: int, **more: Any) -> settings:
    return settings(max_examples=count * _TIMES[PROFILE], **more)


def load_profile() -> None:
    """No deadlines: a machine that is busy with something else is no bug."""
    settings.register_profile("quick", deadline=None, max_examples=50, derandomize=True)
    settings.register_profile("thorough", deadline=None, max_examples=1000, print_blob=True)
    settings.load_profile(PROFILE)
