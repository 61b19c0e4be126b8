# SPDX-License-Identifier: Apache-2.0
"""What vLLM 0.26.0 did on one H200, to stand beside figures of the same setting.

Llama-3.1-8B's shapes, random bf16 weights, rank-16 adapters on all seven linears, 512 requests of 256 tokens in and 256
out, at most 256 running, all there from the start, vLLM's default LoRA kernel configurations; output tokens/s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SETTING = {"shape": "llama-3.1-8b", "rank": 16, "requests": 512, "input": 256, "output": 256, "max_num_seqs": 256}
BASE = 14_100.0
MAX_LORAS_64 = {"off": BASE, "1": 8530.0, "4": 8410.0, "16": 7441.0, "64": 5053.0}
MAX_LORAS_4 = {"off": BASE, "4": 10_829.0, "64": 3426.0}
"""64 adapters, at most 4 at once: 3,012 to 3,426 with the others in host memory, 3,076 with them on disk."""
TARGET_SHARES = {"off": 1.0, "0": 0.99, "1": 0.96, "4": 0.95, "16": 0.90, "64": 0.80}
"""Of its own base, what this project set out to reach."""


def rate(options: Mapping[str, Any], mix: str) -> float | None:
    """vLLM's rate for a mix of benchmarks/engine.py; None where the setting differs."""
    if any(options.get(name) != value for name, value in SETTING.items()):
        return None
    return (MAX_LORAS_4 if options.get("max_loras") == 4 else MAX_LORAS_64).get(mix)
