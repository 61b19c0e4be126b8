# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's paged attention: one wrapper a spec for eager steps, and one a batch size for captured decode steps.

The tensor-core kernels (backend fa2) serve decode as well as prefill, so one compiled module does it all. Measured on
one H200, 2026-11-24, heads 32/8 of 128, us a layer: decode of 256 sequences at 384 / 2,048 tokens 121 / 515 with them,
144 / 733 with FlashInfer's CUDA-core kernel, 136 / 564 with its XQA; 240 decode rows and 7 x 256 prompt rows in one
call 182 with fa2, 583 with fa3. fa3 is faster on long prompts alone (2,048 tokens: 116 against 189).
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from multilora_backend.models.attention import AttentionBackend, TorchAttention
from multilora_backend.models.batch import Batch
from multilora_backend.models.inputs import StepInputs
from multilora_backend.models.layers import Attention, AttentionSpec

log = logging.getLogger(__name__)

WORKSPACE_BYTES = 256 * 2**20
"""Split-KV partial results; shared by all wrappers, since steps run one after the other."""
HEAD_DIMS = (64, 128, 256)
CTAS_PER_SM = 2
"""Programs that FlashInfer plans for: it cuts sequences into parts while there are fewer, KV heads counted."""
_BACKEND = "fa2"


class FlashInferAttention:
    """Steps of any shape; `for_graph` gives the backend of a captured decode step."""

    def __init__(self, layers: Collection[Attention], page_size: int, dtype: torch.dtype, inputs: StepInputs) -> None:
        import flashinfer

        self._flashinfer = flashinfer
        first = next(iter(layers))
        self._shape = (first.num_heads, first.num_kv_heads, first.head_dim, page_size)
        self._specs = sorted({layer.spec for layer in layers}, key=str)
        self._dtype = dtype
        self._inputs = inputs
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device("pages", 0).device)
        self._wrappers = {spec: self._prefill_wrapper() for spec in self._specs}

    def plan(self, batch: Batch) -> None:
        """Queues copies out of `StepInputs`' pinned host buffer, which must hold the batch."""
        slots = len(batch.context_lens)
        host = self._inputs.host
        for spec, wrapper in self._wrappers.items():
            wrapper.plan(
                host("row_starts", slots + 1),
                host("page_starts", slots + 1),
                self._inputs.device("pages", len(batch.pages)),
                host("last_page_lens", slots),
                *self._shape,
                causal=True,
                **_options(spec, self._dtype),
            )

    def run(self, kv_cache: Tensor, query: Tensor, spec: AttentionSpec, out: Tensor | None = None) -> Tensor:
        return self._wrappers[spec].run(query, kv_cache, out=torch.empty_like(query) if out is None else out)

    def for_graph(self, rows: int) -> AttentionBackend:
        """The backend of decode steps of exactly `rows` rows, whose `run` may be captured after one `plan`."""
        return _GraphAttention(self, rows)

    def _prefill_wrapper(self) -> Any:
        return self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=_BACKEND)

    def _decode_wrapper(self, rows: int) -> Any:
        return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=self._inputs.device("page_starts", rows + 1),
            paged_kv_indices_buffer=self._inputs.device("pages", self._inputs.max_pages),
            paged_kv_last_page_len_buffer=self._inputs.device("last_page_lens", rows),
            backend=_BACKEND,
        )


class _GraphAttention:
    """The wrappers' buffers are `StepInputs`' own, so a plan copies only FlashInfer's schedule."""

    def __init__(self, parent: FlashInferAttention, rows: int) -> None:
        self._parent = parent
        self._rows = rows
        self._wrappers = {spec: parent._decode_wrapper(rows) for spec in parent._specs}
        self._row_starts = torch.arange(rows + 1, dtype=torch.int32)
        device = parent._workspace.device
        programs = CTAS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
        self._whole = rows > programs // parent._shape[1]
        self._schedule: dict[AttentionSpec, list[int]] = {}

    def plan(self, batch: Batch) -> None:
        parent, rows = self._parent, self._rows
        starts, lens = parent._inputs.host("page_starts", rows + 1), parent._inputs.host("last_page_lens", rows)
        pages = parent._inputs.device("pages", len(batch.pages))
        context_lens = torch.from_numpy(batch.context_lens)
        for spec, wrapper in self._wrappers.items():
            if spec not in self._schedule:
                wrapper.plan(starts, pages, lens, *parent._shape, **_options(spec, parent._dtype))
            schedule = self._plan(wrapper, spec, starts, context_lens)
            # Where in the workspace a captured run finds what, and how many programs it has.
            if self._schedule.setdefault(spec, schedule) != schedule:
                raise RuntimeError(f"FlashInfer planned {schedule} for a run captured with {self._schedule[spec]}")

    def _plan(self, wrapper: Any, spec: AttentionSpec, starts: Tensor, context_lens: Tensor) -> list[int]:
        """What `wrapper.plan` does last, without its copies and its Python loop over the lengths.

        By private names, as FlashInfer's own fast_decode_plan does it, which cannot say the one thing that counts: told
        of a graph, FlashInfer merges the parts of every sequence even if each has only one, as it does whenever there
        are more sequences than programs. That costs 8 us of 124 at 256 sequences of 384 tokens and 5 of 42 at 64
        (heads 32/8 of 128, H200, 2026-11-27).
        """
        heads, kv_heads, head_dim, page_size = self._parent._shape
        window = _options(spec, self._parent._dtype)["window_left"]
        wrapper._plan_info = wrapper._cached_module.plan(
            wrapper._float_workspace_buffer, wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer,
            self._row_starts, starts, context_lens, self._rows, self._rows, heads, kv_heads, page_size,
            not self._whole, head_dim, head_dim,
            False, window, -1, False, 0,  # not causal, no fixed split, splits allowed, no other programs beside these
        )  # fmt: skip
        return [int(value) for value in wrapper._plan_info]

    def run(self, kv_cache: Tensor, query: Tensor, spec: AttentionSpec, out: Tensor | None = None) -> Tensor:
        return self._wrappers[spec].run(query, kv_cache, out=torch.empty_like(query) if out is None else out)


def create_attention(
    layers: Collection[Attention], page_size: int, dtype: torch.dtype, inputs: StepInputs
) -> AttentionBackend:
    """FlashInfer where it can run, else torch, which is right but slow and cannot be captured."""
    device = inputs.device("pages", 0).device
    if device.type == "cuda":
        head_dim = next(iter(layers)).head_dim
        if head_dim not in HEAD_DIMS or dtype == torch.float32:
            log.warning(
                "attention runs in torch, slowly: FlashInfer has no kernel for head_dim %d, %s", head_dim, dtype
            )
        else:
            try:
                return FlashInferAttention(layers, page_size, dtype, inputs)
            except ImportError as error:
                log.warning("attention runs in torch, slowly: FlashInfer is not installed (%s)", error)
    return TorchAttention(page_size, device)


def _options(spec: AttentionSpec, dtype: torch.dtype) -> dict[str, Any]:
    return {
        # A row sees its window's last position but itself and window - 1 before it.
        "window_left": -1 if spec.window is None else spec.window - 1,
        "logits_soft_cap": spec.softcap,
        "sm_scale": spec.scale,
        "q_data_type": dtype,
        "kv_data_type": dtype,
    }
