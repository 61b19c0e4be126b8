# SPDX-License-Identifier: Apache-2.0
"""The front end without Triton: a raw request in, responses out, whatever becomes of the engine meanwhile.

Threads: Triton's calls `handle`; the link's thread hands over what the engine says; the outbox's thread answers.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from multilora_backend.added_tokens import AddedTokens
from multilora_backend.config import Config
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend import runtime
from multilora_backend.frontend.engine_process import EngineProcess
from multilora_backend.frontend.link import Link
from multilora_backend.frontend.listener import Listener
from multilora_backend.frontend.metrics import Metrics
from multilora_backend.frontend.outbox import Delivery, Outbox, Outcome, Sender
from multilora_backend.frontend.request import GenerateRequest, RawRequest, parse, retokenised
from multilora_backend.frontend.response import ResponseBuilder
from multilora_backend.frontend.tokenizer import Tokenizer
from multilora_backend.frontend.tokenizers import Tokenizers
from multilora_backend.protocol import Failed, Hello, ModelCard, Output, Ready, Retokenise, Stats, Submit

log = logging.getLogger(__name__)

INLINE_BYTES = 16 * 1024
"""Longer inputs are tokenised on a pool, so that a 4 MiB prompt (seconds) does not keep others from being accepted."""
PARSE_THREADS = 2
DRAIN_S = 5.0
MAX_RETOKENISED = 4
"""So often a request is handed back and tokenised anew: once, unless its adapter is replaced at that moment."""


class Service(Listener):
    """One front end. Implements outbox.Observer as well."""

    def __init__(
        self, config: Config, *, model: str, version: str, instance: str, server_pid: int, environ: Mapping[str, str]
    ) -> None:
        """`instance` names this front end among those of the model. Raises MultiloraError; call `start` next."""
        self._config = config
        self._metrics: Metrics | None = None
        self._lock = threading.Lock()
        self._in_flight: dict[int, Delivery] = {}
        """Guarded by the lock: who takes a delivery out of it settles what becomes of the request."""
        self._request_ids = itertools.count(1)
        self._closing = False
        self._model_side: tuple[ModelCard, Tokenizers] | None = None
        self._outbox = Outbox(self)
        self._pool = ThreadPoolExecutor(PARSE_THREADS, thread_name_prefix="parse")
        folder = runtime.RuntimeFolder(runtime.folder_for(config, model, version, server_pid))
        folder.announce(model, version, server_pid)
        engine = EngineProcess(config, folder, server_pid, environ)
        self._link = Link(engine, Hello(f"{instance}-{os.getpid()}", os.getpid(), server_pid), self)

    @property
    def ready(self) -> bool:
        """Whether a request sent now would reach an engine."""
        return self._link.ready and not self._closing

    def start(self) -> ModelCard:
        """Blocks until the engine serves. Raises MultiloraError with the engine's reason if it cannot start."""
        self._outbox.start()
        try:
            self._link.start(self._config.engine_start_timeout_s)
        except MultiloraError:
            self.close()
            raise
        assert self._model_side is not None
        return self._model_side[0]

    def report(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def handle(self, raw: RawRequest, sender: Sender) -> None:
        """Takes a request. Never raises and never waits: whatever is wrong with it is told to its sender."""
        arrival = time.monotonic()
        strings = (tensor for tensor in raw.tensors.values() if tensor.dtype == object)
        size = sum(len(value) for tensor in strings for value in tensor.flat)
        if size <= INLINE_BYTES:
            self._accept(raw, sender, arrival)
        else:
            self._pool.submit(self._accept, raw, sender, arrival)

    def refuse(self, sender: Sender, error: MultiloraError) -> None:
        """Answers a request that could not even be read."""
        self._outbox.push(Delivery(0, sender), error)

    def close(self) -> None:
        """Waits a little for requests in flight, fails the rest, and leaves the engine. May be called again."""
        self._closing = True
        deadline = time.monotonic() + DRAIN_S
        while self._in_flight and time.monotonic() < deadline:
            time.sleep(0.02)
        self._pool.shutdown(wait=True)
        self._fail_all(MultiloraError(ErrorCode.UNAVAILABLE, "the model is being unloaded"))
        self._outbox.close()
        self._link.close()

    def _accept(self, raw: RawRequest, sender: Sender, arrival: float) -> None:
        try:
            self._submit(raw, sender, arrival)
        except MultiloraError as error:
            self.refuse(sender, error)
        except Exception as error:  # a bug in parsing must not cost the client its answer
            log.exception("a request could not be read")
            self.refuse(sender, MultiloraError(ErrorCode.INTERNAL, f"the request could not be read: {error}"))

    def _submit(self, raw: RawRequest, sender: Sender, arrival: float) -> None:
        if self._closing or self._model_side is None:
            raise MultiloraError(ErrorCode.UNAVAILABLE, "the model is being unloaded")
        card, tokenizers = self._model_side
        request, tokenizer = parse(raw, card, self._config, tokenizers)
        delivery = Delivery(next(self._request_ids), sender, arrival=arrival)
        with self._lock:
            self._in_flight[delivery.request_id] = delivery
        try:
            self._send(delivery, request, tokenizer)
        except MultiloraError as error:
            self._fail(delivery.request_id, error)
            return
        self._outbox.watch(delivery)

    def _send(self, delivery: Delivery, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        """To the engine, as `tokenizer` has tokenised it."""
        delivery.request, delivery.builder = request, ResponseBuilder(request, tokenizer)
        self._link.submit(
            Submit(
                delivery.request_id,
                request.prompt_token_ids,
                request.sampling,
                request.adapter,
                request.priority,
                request.tenant,
                tokenizer.digest,
            )
        )

    def _send_again(self, delivery: Delivery, added: AddedTokens) -> None:
        """The engine has handed a request back, of which it has given nothing out yet."""
        assert self._model_side is not None
        assert delivery.request is not None
        (card, tokenizers), request = self._model_side, delivery.request
        try:
            if delivery.times_retokenised >= MAX_RETOKENISED:
                why = f"the tokens of LoRA {request.adapter} have changed {MAX_RETOKENISED} times meanwhile"
                raise MultiloraError(ErrorCode.UNAVAILABLE, f"{why}; please retry")
            delivery.times_retokenised += 1
            tokenizer = tokenizers.learn(request.adapter, added)
            self._send(delivery, retokenised(request, card, tokenizer), tokenizer)
            if delivery.request_id not in self._in_flight:  # cancelled meanwhile, when the engine did not have it
                self._link.abort(delivery.request_id)
        except MultiloraError as error:
            self._fail(delivery.request_id, error)
        except Exception as error:  # as in _accept
            log.exception("request %d could not be tokenised anew", delivery.request_id)
            self._fail(
                delivery.request_id, MultiloraError(ErrorCode.INTERNAL, f"the request could not be read: {error}")
            )

    def _fail(self, request_id: int, error: MultiloraError) -> None:
        with self._lock:
            delivery = self._in_flight.pop(request_id, None)
        if delivery is not None:
            self._outbox.push(delivery, error)

    def _fail_all(self, error: MultiloraError) -> None:
        for request_id in list(self._in_flight):
            self._fail(request_id, error)

    # What the link's thread calls.

    def on_ready(self, ready: Ready) -> None:
        if self._model_side is None or self._model_side[0] != ready.card:
            self._model_side = ready.card, Tokenizers(Tokenizer(ready.card))

    def on_outputs(self, outputs: list[Output]) -> None:
        for output in outputs:
            delivery = self._in_flight.get(output.request_id)
            if delivery is not None:
                self._outbox.push(delivery, output)

    def on_failed(self, failed: Failed) -> None:
        self._fail(failed.request_id, MultiloraError(failed.code, failed.message))

    def on_retokenise(self, message: Retokenise) -> None:
        delivery = self._in_flight.get(message.request_id)
        if delivery is not None:
            with suppress(RuntimeError):  # the pool is closed, after which all that is in flight is failed
                self._pool.submit(self._send_again, delivery, message.tokens)

    def on_stats(self, stats: Stats, leads: bool) -> None:
        if self._metrics is not None:
            self._metrics.engine(stats, leads)

    def on_lost(self, reason: str) -> None:
        self._fail_all(MultiloraError(ErrorCode.INTERNAL, f"{reason}; the request is lost, please send it again"))
        if self._metrics is not None:
            self._metrics.engine_lost()

    # What the outbox's thread calls.

    def on_output(self, delivery: Delivery, output: Output, num_tokens: int, stopped: list[int]) -> None:
        for index in stopped:
            self._link.abort(delivery.request_id, index)
        if self._metrics is not None:
            self._metrics.output(delivery, output, num_tokens, bool(stopped))

    def on_closed(self, delivery: Delivery, outcome: Outcome, error: MultiloraError | None) -> None:
        with self._lock:
            was_in_flight = self._in_flight.pop(delivery.request_id, None) is not None
        # One that ended with an error of our own making still runs in the engine.
        if was_in_flight and outcome is not Outcome.FINISHED:
            self._link.abort(delivery.request_id)
        if self._metrics is not None:
            self._metrics.closed(delivery, outcome, error)

    def on_tick(self) -> None:
        if self._metrics is not None:
            self._metrics.flush()
