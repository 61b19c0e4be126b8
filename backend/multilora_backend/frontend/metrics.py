# SPDX-License-Identifier: Apache-2.0
"""Custom metrics on Triton's own endpoint: what becomes of requests here, and what the engine reports.

What happens is only added up and sent by `flush`, a few times a second, on the outbox's thread.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from multilora_backend.core import FinishReason, adapter_name
from multilora_backend.errors import MultiloraError
from multilora_backend.frontend.engine_metrics import EngineMetrics
from multilora_backend.frontend.labels import BASE_MODEL, NO_TENANT, LabelBudget
from multilora_backend.frontend.meters import Meters
from multilora_backend.frontend.outbox import Delivery, Outcome
from multilora_backend.protocol import Output, Stats

_BY_ADAPTER = "multilora:adapter_time_to_first_token_seconds"
_BY_TENANT = "multilora:tenant_tokens_total"


class Metrics:
    """`engine` and `engine_lost` may be called by any thread, everything else by the outbox's."""

    def __init__(
        self, family: Any, model: str, version: str, max_model_len: int, *, adapters: int = 64, tenants: int = 64
    ) -> None:
        """`family` is pb_utils.MetricFamily. Raises what it raises, for one if Triton's metrics are switched off.

        So many `adapters` and `tenants` have series of their own.
        """
        self._meters = Meters(family, {"model": model, "version": version}, max_model_len)
        self._engine = EngineMetrics(self._meters)
        self._budgets = {_BY_ADAPTER: LabelBudget(adapters), _BY_TENANT: LabelBudget(tenants)}
        self._reports: deque[tuple[Stats, bool] | None] = deque()

    def output(self, delivery: Delivery, output: Output, num_tokens: int, stopped: bool) -> None:
        """A delivery took in `num_tokens` tokens; `stopped` by a stop string."""
        request, meters = delivery.request, self._meters
        tenant = self._label(_BY_TENANT, "tenant", (request.tenant if request else "") or NO_TENANT)
        if delivery.first_output == delivery.last_output and request is not None:
            waited = delivery.first_output - delivery.arrival
            adapter = self._label(_BY_ADAPTER, "adapter_name", adapter_name(request.adapter) or BASE_MODEL)
            meters.observe("vllm:time_to_first_token_seconds", waited)
            meters.observe(_BY_ADAPTER, waited, adapter)
            meters.add("vllm:prompt_tokens_total", len(request.prompt_token_ids))
            meters.add(_BY_TENANT, len(request.prompt_token_ids), tenant, ("kind", "prompt"))
        meters.add("vllm:generation_tokens_total", num_tokens)
        meters.add(_BY_TENANT, num_tokens, tenant, ("kind", "generation"))
        reason = FinishReason.STOP if stopped else output.finish_reason
        if reason is not None and num_tokens:
            meters.add("vllm:request_success_total", 1, ("finished_reason", reason.value))

    def closed(self, delivery: Delivery, outcome: Outcome, error: MultiloraError | None) -> None:
        meters = self._meters
        if outcome is Outcome.CANCELLED:
            meters.add("vllm:request_success_total", 1, ("finished_reason", FinishReason.ABORT.value))
        elif error is not None:
            meters.add("multilora:request_failures_total", 1, ("code", error.code.value))
        request, builder = delivery.request, delivery.builder
        if outcome is not Outcome.FINISHED or request is None or builder is None:
            return
        tokens = builder.num_output_tokens
        per_sequence = tokens / request.sampling.n
        meters.observe("vllm:e2e_request_latency_seconds", time.monotonic() - delivery.arrival)
        meters.observe("vllm:request_prompt_tokens", len(request.prompt_token_ids))
        meters.observe("vllm:request_generation_tokens", tokens)
        meters.observe("vllm:request_params_n", request.sampling.n)
        if per_sequence > 1:
            mean = (delivery.last_output - delivery.first_output) / (per_sequence - 1)
            meters.observe("vllm:time_per_output_token_seconds", mean)

    def engine(self, stats: Stats, leads: bool) -> None:
        self._reports.append((stats, leads))

    def engine_lost(self) -> None:
        self._reports.append(None)

    def flush(self) -> None:
        """Sends what has changed."""
        while self._reports:
            report = self._reports.popleft()
            if report is None:
                self._engine.lost()
            else:
                self._engine.take(*report)
        self._meters.flush()

    def _label(self, series: str, name: str, value: str) -> tuple[str, str]:
        return name, self._budgets[series].label(value)
