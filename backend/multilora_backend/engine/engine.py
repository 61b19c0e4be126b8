# SPDX-License-Identifier: Apache-2.0
"""The engine without its sockets: requests in, steps, messages out. One thread, no waiting."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from multilora_backend.added_tokens import AddedTokens
from multilora_backend.config import Config
from multilora_backend.core import UNKNOWN_TOKEN, FinishReason, Sequence, StepPlan
from multilora_backend.engine import memory
from multilora_backend.engine.adapters import create_adapters, see_to_holders
from multilora_backend.engine.administration import Administration
from multilora_backend.engine.admission import admit, sequences_of
from multilora_backend.engine.outputs import output_of
from multilora_backend.engine.runner import Launched, create_runner
from multilora_backend.engine.statistics import Statistics
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.models.fusion import linears
from multilora_backend.models.loader import attach_kv_cache, load_model, model_card
from multilora_backend.models.strategies import create_strategy
from multilora_backend.protocol import (
    Abort,
    AdapterCommand,
    EngineMessage,
    Failed,
    Output,
    Outputs,
    Retokenise,
    Stats,
    Submit,
)
from multilora_backend.scheduling.pages import PageTable
from multilora_backend.scheduling.policy import Policy
from multilora_backend.scheduling.scheduler import Scheduler
from multilora_backend.scheduling.tenants import Tenants

log = logging.getLogger(__name__)

CUDA_CPU_THREADS = 4
"""torch's CPU threads beside a CUDA device: all that computes on the CPU then is the layout of adapters."""
CHECK_ADAPTERS_S = 1.0
"""How long the start waits for the check of all adapters; with thousands of them it goes on while serving."""


class Engine:
    """Owns the model, the pages, the adapters and every sequence.

    With `async_scheduling` a step is scheduled and launched while the one before it still runs on the device, and its
    results are read one `step` later. Tokens that are not known yet are UNKNOWN_TOKEN in their sequences meanwhile; a
    sequence that turns out to have ended has computed one row in vain.
    """

    def __init__(self, config: Config, wake: Callable[[], None]) -> None:
        """Loads the model. `wake` is called from loader threads when an adapter's load has ended."""
        started = time.monotonic()
        # A core is left to the front end: OpenMP's threads wait for each other, so one that is preempted stops all.
        torch.set_num_threads(config.num_threads or max(1, len(os.sched_getaffinity(0)) - 1))
        self.config = config
        tenants, policy = Tenants.read(config.tenants), Policy.from_config(config)  # before anything that takes long
        self.model = load_model(config)
        if self.model.device.type == "cuda" and not config.num_threads:
            torch.set_num_threads(min(torch.get_num_threads(), CUDA_CPU_THREADS))
        self.adapters, self._watcher = create_adapters(config, self.model, wake)
        self._lora = create_strategy(config.lora_strategy, linears(self.model.module), self.adapters.pool)
        # After the adapters' memory: on CUDA the pages take what is left.
        num_pages = memory.num_pages(config, self.model)
        self.pages = PageTable(num_pages, config.block_size, config.enable_prefix_caching)
        self.model.max_model_len = min(self.model.max_model_len, (num_pages - 1) * config.block_size)
        self.card = model_card(self.model, config)
        attach_kv_cache(self.model.module, num_pages, config.block_size, self.model.device)
        self.adapters.check_all(wait_s=CHECK_ADAPTERS_S)
        host = memory.host_pages(config, self.model)
        self.scheduler = Scheduler(
            self.pages,
            self.adapters,
            policy,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_loras=config.max_loras,
            tenants=tenants,
            host=host,
        )
        self.runner = create_runner(config, self.model, self._lora, host.num_pages)
        cuda = self.model.device.type == "cuda"
        self._overlap = config.async_scheduling == "true" or (config.async_scheduling == "auto" and cuda)
        self._in_flight: Launched | None = None
        self.statistics = Statistics(self.adapters)
        self._replies: defaultdict[str, list[EngineMessage]] = defaultdict(list)
        self.administration = Administration(self.adapters, config.admin_token, self._reply)
        if self._watcher is not None:
            self._watcher.start()
        log.info("engine ready after %.1f s, %d KV pages", time.monotonic() - started, num_pages)

    def submit(self, frontend: str, message: Submit) -> None:
        """Takes a request in, or answers it with Failed."""
        try:
            adapter = admit(self, message)
        except MultiloraError as error:
            self._replies[frontend].append(Failed(message.request_id, error.code, error.message))
            return
        if isinstance(adapter, Retokenise):
            self._replies[frontend].append(adapter)
            return
        for sequence in sequences_of(frontend, message, adapter, self.model.max_model_len):
            if adapter:
                self.adapters.hold(adapter)
            self.scheduler.add(sequence)

    def abort(self, frontend: str, message: Abort) -> None:
        for sequence in self._of_request(frontend, message.request_id):
            if message.index in (-1, sequence.key[2]):
                self._finish(sequence, FinishReason.ABORT)

    def command(self, frontend: str, message: AdapterCommand) -> None:
        self.administration.handle(frontend, message)

    def drop_frontend(self, frontend: str) -> None:
        """A front end is gone: so are its requests."""
        self.administration.drop_frontend(frontend)
        for sequence in self._sequences():
            if sequence.key[0] == frontend:
                self._finish(sequence, FinishReason.ABORT)
        self._replies.pop(frontend, None)

    def step(self) -> bool:
        """Launches the next step and takes in what the one before it has computed.

        False: nothing to do until a message or an adapter arrives.
        """
        wanted = self._watcher.take() if self._watcher is not None else None
        if wanted is not None:
            self.adapters.reconcile(wanted)
        see_to_holders(self, self.adapters.poll())
        self.administration.poll()
        now = time.monotonic()
        plan = self.scheduler.schedule(now)
        self.runner.move_pages(plan.moves)
        launched = self._launch(plan, now) if plan.slots else None
        before, self._in_flight = self._in_flight, launched
        if before is not None:
            self._collect(before)
        if launched is not None and not self._overlap:
            self._in_flight = None
            self._collect(launched)
        return bool(plan.slots) or before is not None

    def _launch(self, plan: StepPlan, now: float) -> Launched | None:
        self.statistics.launched(plan, now)
        try:
            launched = self.runner.launch(plan)
        except Exception as error:  # whatever it is, it is this batch's alone, see _step_failed
            self._step_failed(plan, error)
            return None
        for slot in launched.slots:
            slot.sequence.token_ids.append(UNKNOWN_TOKEN)
        return launched

    def _collect(self, launched: Launched) -> None:
        """Waits for a step; its tokens go to their sequences and to the front ends."""
        try:
            sampled = launched.result()
        except Exception as error:  # as above: a kernel's error comes to light here
            self._step_failed(launched.plan, error)
            return
        outputs: defaultdict[str, list[Output]] = defaultdict(list)
        for slot, token in sampled:
            if not slot.sequence.finished:
                output = output_of(slot, token, self.card.eos_token_ids)
                outputs[slot.sequence.key[0]].append(output)
                if output.finish_reason is not None:
                    self._finish(slot.sequence, output.finish_reason)
        self.scheduler.publish(launched.plan)
        for frontend, items in outputs.items():
            self._replies[frontend].append(Outputs(items))

    def _step_failed(self, plan: StepPlan, error: Exception) -> None:
        """Whatever a batch died of, it ends that batch's requests and not the server, as long as the device lives."""
        log.error("step %d failed", self.statistics.steps, exc_info=error)
        self._lora.forget_copies()
        message = f"the step failed: {type(error).__name__}: {error}"
        self.fail([slot.sequence for slot in plan.slots], ErrorCode.INTERNAL, message)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()  # raises if the device is lost: the front ends then start a new engine

    def take_replies(self) -> dict[str, list[EngineMessage]]:
        """What is to be sent, by front end."""
        replies, self._replies = self._replies, defaultdict(list)
        return replies

    def stats(self) -> Stats:
        """Gauges now, totals, and what happened since the last call."""
        return self.statistics.collect(self)

    @property
    def idle(self) -> bool:
        """Nothing is waiting, running or under way on the device."""
        return not self.scheduler.has_work and self._in_flight is None

    def check_idle(self) -> None:
        """Raises RuntimeError if an idle engine still holds something."""
        self.pages.check()
        pages, host = self.pages, self.scheduler.host
        held = {"KV pages": pages.num_pages - 1 - pages.num_free, "pages on the host": host.num_pages - host.num_free}
        for what, count in {**held, "holds of adapters": self.adapters.held}.items():
            if count:
                raise RuntimeError(f"idle, but there are {count} {what}")

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
        self.adapters.close()

    def _reply(self, frontend: str, message: EngineMessage) -> None:
        self._replies[frontend].append(message)

    def _sequences(self) -> list[Sequence]:
        return [*self.scheduler.running.values(), *self.scheduler.waiting.values()]

    def _of_request(self, frontend: str, request_id: int) -> list[Sequence]:
        """By key: were all that wait gone through for each abort, 10,000 aborts would stop everybody for 7 s."""
        found = (self.scheduler.find((frontend, request_id, index)) for index in range(self.config.max_n))
        return [sequence for sequence in found if sequence is not None]

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, reason)
        if sequence.adapter:
            self.adapters.drop(sequence.adapter)
        self.runner.sampler.forget(sequence)

    def fail(self, sequences: list[Sequence], code: ErrorCode, message: str) -> None:
        """Ends the requests that these sequences belong to, with one error each."""
        self._answer(sequences, lambda request_id: Failed(request_id, code, message))

    def retokenise(self, sequences: list[Sequence], tokens: AddedTokens) -> None:
        """Gives the requests that these sequences belong to back; none of them may have output."""
        self._answer(sequences, lambda request_id: Retokenise(request_id, tokens))

    def _answer(self, sequences: list[Sequence], message: Callable[[int], EngineMessage]) -> None:
        ended = {sequence.key[:2] for sequence in sequences}
        for frontend, request_id in sorted(ended):
            for sequence in self._of_request(frontend, request_id):  # a request's n sequences end together
                self._finish(sequence, FinishReason.ERROR)
            self._replies[frontend].append(message(request_id))
