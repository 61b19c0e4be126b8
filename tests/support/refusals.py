# SPDX-License-Identifier: Apache-2.0
"""An adapter that cannot be served is refused, whoever reads it."""

from __future__ import annotations

import pytest
import torch

from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.errors import MultiloraError


def refused(folder, sites, match, weights=False):
    """Both ways of reading refuse it with the same words; `weights`: only the one that reads the weights can."""
    with pytest.raises(MultiloraError, match=match) as read:
        read_adapter(folder, sites, torch.float32)
    if not weights:
        with pytest.raises(MultiloraError) as checked:
            check_adapter(folder, sites)
        assert checked.value.message == read.value.message
