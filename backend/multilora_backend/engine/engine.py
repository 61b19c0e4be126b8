# SPDX-License-Identifier: Apache-2.0
"""The engine without its sockets: requests in, steps, messages out. One thread, no waiting."""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import torch

from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.config import Config
from multilora_backend.core import FinishReason, Sequence, SequenceStatus
from multilora_backend.engine.runner import ModelRunner
from multilora_backend.engine.sampler import Sampled
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.models.attention import TorchAttention
from multilora_backend.models.loader import LoadedModel, attach_kv_cache, bytes_per_token, load_model, model_card
from multilora_backend.models.lora import create_strategy
from multilora_backend.protocol import Abort, EngineMessage, Failed, Output, Outputs, Stats, Submit
from multilora_backend.scheduling.pages import PageTable
from multilora_backend.scheduling.policy import AdapterFirst, FirstCome, Policy
from multilora_backend.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

CPU_KV_CACHE_BYTES = 256 * 2**20
ADAPTER_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
CHECK_ADAPTERS_S = 1.0
"""How long the start waits for the check of all adapters; with thousands of them it goes on while serving."""


class Engine:
    """Owns the model, the pages, the adapters and every sequence."""

    def __init__(self, config: Config, wake: Callable[[], None]) -> None:
        """Loads the model. `wake` is called from loader threads when an adapter's load has ended."""
        # A core is left to the front end: OpenMP's threads wait for each other, so one that is preempted stops all.
        torch.set_num_threads(config.num_threads or max(1, len(os.sched_getaffinity(0)) - 1))
        self.config = config
        self.model = load_model(config)
        self.adapters = AdapterManager(
            Catalogue.read(config.adapters) if config.lora_enabled else None,
            self.model.sites,
            device_bytes=config.adapter_device_bytes or ADAPTER_BYTES[self.model.device.type],
            host_bytes=config.adapter_host_bytes,
            load_threads=config.adapter_load_threads,
            dtype=self.model.dtype,
            device=self.model.device,
            on_change=wake,
        )
        # After the adapters' pool: on CUDA the pages take what is left.
        self.pages = PageTable(_num_pages(config, self.model), config.block_size, config.enable_prefix_caching)
        self.model.max_model_len = min(self.model.max_model_len, (self.pages.num_pages - 1) * config.block_size)
        self.card = model_card(self.model, config)
        attach_kv_cache(self.model.module, self.pages.num_pages, config.block_size, self.model.device)
        self.adapters.check_all(wait_s=CHECK_ADAPTERS_S)
        self.scheduler = Scheduler(
            self.pages,
            self.adapters,
            _policy(config),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_loras=config.max_loras,
        )
        lora = create_strategy(config.lora_strategy, self.model.sites, self.adapters.pool, self.model.device)
        attention = TorchAttention(config.block_size, self.model.device)
        self.runner = ModelRunner(self.model, attention, lora, config.block_size)
        self.steps = 0
        self.adapters_per_step_max = 0
        self._adapters_per_step: Counter[int] = Counter()
        self._replies: defaultdict[str, list[EngineMessage]] = defaultdict(list)

    def submit(self, frontend: str, message: Submit) -> None:
        """Takes a request in, or answers it with Failed."""
        try:
            self._check(message)
        except MultiloraError as error:
            self._replies[frontend].append(Failed(message.request_id, error.code, error.message))
            return
        sampling = message.sampling
        seed = random.getrandbits(62) if sampling.seed is None else sampling.seed
        for index in range(sampling.n):
            self.scheduler.add(
                Sequence(
                    key=(frontend, message.request_id, index),
                    prompt_len=len(message.prompt_token_ids),
                    token_ids=list(message.prompt_token_ids),
                    sampling=sampling,
                    seed=seed + index,
                    adapter=message.adapter,
                    priority=message.priority,
                    tenant=message.tenant,
                    arrival=time.monotonic(),
                )
            )

    def abort(self, frontend: str, message: Abort) -> None:
        for sequence in self._sequences():
            name, request_id, index = sequence.key
            if (name, request_id) == (frontend, message.request_id) and message.index in (-1, index):
                self.scheduler.finish(sequence, FinishReason.ABORT)

    def drop_frontend(self, frontend: str) -> None:
        """A front end is gone: so are its requests."""
        for sequence in self._sequences():
            if sequence.key[0] == frontend:
                self.scheduler.finish(sequence, FinishReason.ABORT)
        self._replies.pop(frontend, None)

    def step(self) -> bool:
        """Runs one step if anything can run. False: nothing to do until a message or an adapter arrives."""
        for name in self.adapters.poll():
            self._fail_waiting_for(name)
        plan = self.scheduler.schedule(time.monotonic())
        if not plan.slots:
            return False
        self.steps += 1
        count = len(plan.adapters)
        self._adapters_per_step[count] += 1
        self.adapters_per_step_max = max(self.adapters_per_step_max, count)
        try:
            sampled = self.runner.run(plan)
        except Exception as error:  # whatever a batch died of, it ends that batch's requests and not the server
            log.exception("step %d failed", self.steps)
            message = f"the step failed: {type(error).__name__}: {error}"
            self._fail([slot.sequence for slot in plan.slots], ErrorCode.INTERNAL, message)
            return True
        self.scheduler.publish(plan)
        outputs: defaultdict[str, list[Output]] = defaultdict(list)
        for slot, token in sampled:
            outputs[slot.sequence.key[0]].append(self._append(slot.sequence, token))
        for frontend, items in outputs.items():
            self._replies[frontend].append(Outputs(items))
        return True

    def take_replies(self) -> dict[str, list[EngineMessage]]:
        """What is to be sent, by front end."""
        replies, self._replies = self._replies, defaultdict(list)
        return replies

    def stats(self) -> Stats:
        """Gauges now, totals, and what happened since the last call."""
        waiting = self.scheduler.waiting.values()
        adapters = self.adapters.stats()
        per_step, self._adapters_per_step = self._adapters_per_step, Counter()
        return Stats(
            num_running=len(self.scheduler.running),
            num_waiting=len(waiting),
            num_waiting_adapter=sum(s.status is SequenceStatus.WAITING_ADAPTER for s in waiting),
            kv_cache_usage=self.pages.usage,
            adapters_by_state=adapters.by_state,
            max_loras=self.config.max_loras,
            running_adapters=sorted({s.adapter for s in self.scheduler.running.values() if s.adapter}),
            waiting_adapters=sorted({s.adapter for s in waiting if s.adapter}),
            steps_total=self.steps,
            preemptions_total=self.scheduler.preemptions,
            prefix_cache_queries_total=self.pages.queries,
            prefix_cache_hits_total=self.pages.hits,
            adapter_loads_total=adapters.loads_total,
            adapter_load_failures_total=adapters.load_failures_total,
            adapter_evictions_total=adapters.evictions_total,
            adapter_load_seconds=adapters.load_seconds,
            adapters_per_step=dict(per_step),
            adapters_per_step_max=self.adapters_per_step_max,
        )

    def check_idle(self) -> None:
        """Raises RuntimeError if an idle engine still holds something."""
        self.pages.check()
        if self.pages.num_free != self.pages.num_pages - 1:
            raise RuntimeError(f"idle, but {self.pages.num_pages - 1 - self.pages.num_free} pages are held")

    def close(self) -> None:
        self.adapters.close()

    def _sequences(self) -> list[Sequence]:
        return [*self.scheduler.running.values(), *self.scheduler.waiting.values()]

    def _check(self, message: Submit) -> None:
        prompt = len(message.prompt_token_ids)
        if not 1 <= prompt < self.model.max_model_len:
            limit = self.model.max_model_len - 1
            raise invalid("text_input", f"must be 1 to {limit} tokens, got {prompt}")
        if max(message.prompt_token_ids) >= self.card.vocab_size or min(message.prompt_token_ids) < 0:
            raise invalid("text_input", f"token ids must be below the vocabulary's {self.card.vocab_size}")
        if len(self.scheduler.waiting) + message.sampling.n > self.config.max_waiting:
            limit = self.config.max_waiting
            raise MultiloraError(ErrorCode.UNAVAILABLE, f"too many waiting requests: max_waiting is {limit}")
        if message.adapter:
            self.adapters.check(message.adapter)

    def _append(self, sequence: Sequence, sampled: Sampled) -> Output:
        """Adds a token to its sequence and ends the sequence if that was its last."""
        sequence.token_ids.append(sampled.token_id)
        if sampled.logprob is not None:
            sequence.cumulative_logprob += sampled.logprob
        reason = self._finish_reason(sequence, sampled.token_id)
        if reason is not None:
            self.scheduler.finish(sequence, reason)
        _, request_id, index = sequence.key
        return Output(
            request_id=request_id,
            index=index,
            token_ids=[sampled.token_id],
            logprobs=None if sampled.top is None else [sampled.top],
            cumulative_logprob=sequence.cumulative_logprob,
            finish_reason=reason,
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.sampling
        # Before min_tokens the sampler cannot draw any of these.
        if token_id in sampling.stop_token_ids or (token_id in self.card.eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        if sequence.num_output_tokens >= sampling.max_tokens or sequence.num_tokens >= self.model.max_model_len:
            return FinishReason.LENGTH
        return None

    def _fail_waiting_for(self, adapter: str) -> None:
        """The adapter could not be loaded: its waiting requests end with the reason, nobody else notices."""
        try:
            self.adapters.check(adapter)
        except MultiloraError as error:
            self._fail(self.scheduler.waiting_for(adapter), error.code, error.message)

    def _fail(self, sequences: list[Sequence], code: ErrorCode, message: str) -> None:
        failed = {sequence.key[:2] for sequence in sequences}
        for sequence in self._sequences():  # a request's n sequences fail together
            if sequence.key[:2] in failed:
                self.scheduler.finish(sequence, FinishReason.ERROR)
        for frontend, request_id in sorted(failed):
            self._replies[frontend].append(Failed(request_id, code, message))


def _policy(config: Config) -> Policy:
    return FirstCome() if config.policy == "first_come" else AdapterFirst(config.max_overtake_s)


def _num_pages(config: Config, model: LoadedModel) -> int:
    """KV pages, the trash page included, within `kv_cache_bytes`."""
    budget = config.kv_cache_bytes
    if not budget:
        budget = CPU_KV_CACHE_BYTES
        if model.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(model.device)
            budget = int(free - (1 - config.gpu_memory_utilization) * total)
    page_bytes = bytes_per_token(model) * config.block_size
    if budget < 2 * page_bytes:
        raise invalid("kv_cache_bytes", f"must be at least {2 * page_bytes} (two pages), got {budget}")
    return budget // page_bytes
