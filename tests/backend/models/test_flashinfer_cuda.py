# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's attention as the engine plans it, against attention in torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_models import CUDA
from multilora_backend.models.attention import TorchAttention
from multilora_backend.models.batch import Batch
from multilora_backend.models.flashinfer_attention import FlashInferAttention
from multilora_backend.models.inputs import StepInputs
from multilora_backend.models.layers import AttentionSpec

pytestmark = [*CUDA, pytest.mark.timeout(600)]
PAGE, HEADS, KV_HEADS, HEAD_DIM = 16, 16, 8, 64
DTYPE = torch.bfloat16
SPEC = AttentionSpec(scale=HEAD_DIM**-0.5)
NUM_PAGES = 600


def decode_batch(lens: list[int], generator: torch.Generator) -> Batch:
    """One row each, in pages that lie anywhere and are nobody else's."""
    counts = [-(-length // PAGE) for length in lens]
    pages = torch.randperm(NUM_PAGES, generator=generator)[: sum(counts)].int().numpy()
    ints: dict[str, Any] = {
        name: torch.tensor(values, dtype=torch.int32).numpy()
        for name, values in {
            "token_ids": [0] * len(lens),
            "sources": [-1] * len(lens),
            "positions": [length - 1 for length in lens],
            "write_slots": [0] * len(lens),
            "adapter_slots": [-1] * len(lens),
            "row_starts": range(len(lens) + 1),
            "context_lens": lens,
            "page_starts": [sum(counts[:i]) for i in range(len(lens) + 1)],
            "sample_rows": range(len(lens)),
        }.items()
    }
    return Batch(**ints, pages=pages, sample_slots=list(range(len(lens))), page_size=PAGE)


@pytest.fixture(scope="module")
def kv_cache() -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (NUM_PAGES, 2, PAGE, KV_HEADS, HEAD_DIM)
    return torch.randn(shape, generator=generator, device="cuda", dtype=DTYPE)


# With 8 KV heads there are sequences enough for every program from some tens of them on: 33 on an H200.
@pytest.mark.parametrize("rows", [3, 16, 80, 100])
def test_a_captured_decode_step_serves_any_lengths(rows: int, kv_cache: Tensor):
    pytest.importorskip("flashinfer")
    layer: Any = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, spec=SPEC)
    inputs = StepInputs(rows, rows + 1, 1, NUM_PAGES, torch.device("cuda"))
    backend = FlashInferAttention([layer], PAGE, DTYPE, inputs).for_graph(rows)
    reference = TorchAttention(PAGE, torch.device("cuda"))
    query, out = (torch.empty(rows, HEADS, HEAD_DIM, device="cuda", dtype=DTYPE) for _ in range(2))

    def enter(batch: Batch) -> None:
        inputs.wait()
        inputs.load(batch, None)
        backend.plan(batch)
        inputs.planned()

    generator = torch.Generator().manual_seed(rows)
    enter(Batch.idle(1, PAGE).padded(rows))
    backend.run(kv_cache, query, SPEC, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.run(kv_cache, query, SPEC, out)
    # Even, all in one page, and one sequence that is as long as all others together.
    for lens in ([70] * rows, list(range(1, 17)) * (rows // 16) + [5] * (rows % 16), [1900, *[17] * (rows - 1)]):
        batch = decode_batch(lens, generator)
        query.copy_(torch.randn(query.shape, generator=generator))
        out.fill_(torch.nan)
        enter(batch)
        graph.replay()
        reference.plan(batch)
        expected = reference.run(kv_cache, query, SPEC).double()
        difference = (out.double() - expected).norm() / expected.norm()
        assert difference < 2 * torch.finfo(DTYPE).eps, f"lengths {lens[:3]}..."
