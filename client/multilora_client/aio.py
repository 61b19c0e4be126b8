# SPDX-License-Identifier: Apache-2.0
"""The client for asyncio: the methods of `client.Client`, with streams as asynchronous iterators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from multilora_client import settings
from multilora_client.adapters import AsyncAdapters
from multilora_client.errors import RequestTimeout, ServerUnavailable
from multilora_client.exchange import Exchange
from multilora_client.settings import Settings
from multilora_client.types import AdapterChoice, Chunk, Completion, Message, SamplingOptions
from multilora_client.wire import RemainingTime, Request, parse_result

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class _Call(Protocol):
    async def __anext__(self) -> Chunk: ...
    def cancel(self) -> None: ...


class _Transport(Protocol):
    def open(self, request: Request, remaining: RemainingTime) -> _Call: ...
    async def ready(self, model: str, timeout: float) -> bool: ...
    async def close(self) -> None: ...


class AsyncCompletionStream(AsyncIterator[Chunk]):
    """The chunks of one answer as they come; the request is sent by the first step of the loop.

    Leaving the loop early, `close`, an exception in the loop's body, cancelling the task that waits and dropping
    the last reference all cancel the request on the server, at once: `close` does not need to be awaited.
    """

    def __init__(self, client: AsyncClient, exchange: Exchange) -> None:
        self._client = client
        self._exchange = exchange
        self._call: _Call | None = None
        self._ended = False

    async def __anext__(self) -> Chunk:
        while not self._ended:
            try:
                self._exchange.start()
                if self._call is None:
                    transport = self._client._transport()
                    self._call = transport.open(self._exchange.request, self._exchange.remaining)
                return self._exchange.take(await self._call.__anext__())
            except StopAsyncIteration:
                self._ended = True
            except ServerUnavailable as error:
                await self._pause(error)
            except RequestTimeout:
                self.close()
                raise self._exchange.timed_out() from None
            except BaseException:
                # BaseException: CancelledError, the way in which a task's cancellation arrives.
                self.close()
                raise
        raise StopAsyncIteration

    async def _pause(self, error: ServerUnavailable) -> None:
        try:
            delay = self._exchange.backoff(error)
            if self._call is not None:
                self._call.cancel()
                self._call = None
            await asyncio.sleep(delay)
        except BaseException:
            self.close()
            raise

    async def completion(self) -> Completion:
        """Everything so far as one answer; reads the stream to its end unless it was closed."""
        async for _ in self:
            pass
        return self._exchange.completion()

    def close(self) -> None:
        """Cancels the request if it still runs; iteration then stops."""
        ended, self._ended = self._ended, True
        if not ended and self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # The event loop may be gone already, and the connection with it.
        with suppress(RuntimeError):
            self.close()


class AsyncClient:
    """`client.Client` for asyncio, with the same arguments. Connects in the event loop that first uses it.

    >>> async with AsyncClient("localhost:8001") as client:
    ...     answers = await asyncio.gather(*(client.generate("hello", name) for name in ("upper", "rot13")))
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        protocol: settings.Protocol = "grpc",
        model: str = settings.DEFAULT_MODEL,
        timeout: float = settings.DEFAULT_TIMEOUT_S,
        retries: int = settings.DEFAULT_RETRIES,
        headers: Mapping[str, str] | None = None,
        admin_model: str = settings.DEFAULT_ADMIN_MODEL,
        admin_token: str = "",
    ) -> None:
        self.settings = Settings(url, protocol, model, timeout, retries, headers or {}, admin_model, admin_token)
        self.adapters = AsyncAdapters(self._command)
        self._made: _Transport | None = None

    async def generate(
        self,
        prompt: str,
        adapter: AdapterChoice | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion:
        """The whole answer to `prompt`, without the prompt; `adapter` None asks the base model, a mapping a sum."""
        return await self._open(prompt, adapter, False, timeout, sampling).completion()

    def stream(
        self,
        prompt: str,
        adapter: AdapterChoice | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncCompletionStream:
        """The answer in chunks of new text, as soon as they are there."""
        return self._open(prompt, adapter, True, timeout, sampling)

    async def chat(
        self,
        messages: Sequence[Message],
        adapter: AdapterChoice | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion:
        """Like `generate`, with the prompt made from `messages` by the model's chat template."""
        return await self._open(messages, adapter, False, timeout, sampling).completion()

    def chat_stream(
        self,
        messages: Sequence[Message],
        adapter: AdapterChoice | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncCompletionStream:
        return self._open(messages, adapter, True, timeout, sampling)

    async def ready(self, wait_s: float = 0.0) -> bool:
        """Whether the model takes requests; asks again and again for up to `wait_s` seconds until it does."""
        deadline = time.monotonic() + wait_s
        while not await self._transport().ready(self.settings.model, settings.READY_TIMEOUT_S):
            if time.monotonic() + settings.READY_POLL_S > deadline:
                return False
            await asyncio.sleep(settings.READY_POLL_S)
        return True

    async def _command(self, action: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        exchange = self.settings.command(action, arguments)
        stream = AsyncCompletionStream(self, exchange)
        return parse_result((await stream.completion()).text)

    async def close(self) -> None:
        """Ends the connection and what still runs on it."""
        made, self._made = self._made, None
        if made is not None:
            await made.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _open(
        self,
        prompt: str | Sequence[Message],
        adapter: AdapterChoice | None,
        stream: bool,
        timeout: float | None,
        sampling: SamplingOptions,
    ) -> AsyncCompletionStream:
        exchange = self.settings.exchange(prompt, adapter, stream=stream, timeout=timeout, sampling=sampling)
        return AsyncCompletionStream(self, exchange)

    def _transport(self) -> _Transport:
        """Made late, because a channel belongs to the loop that runs when it is made."""
        if self._made is None:
            if self.settings.protocol == "grpc":
                from multilora_client.grpc_transport import AsyncGrpcTransport

                self._made = AsyncGrpcTransport(self.settings.endpoint, self.settings.headers)
            else:
                from multilora_client.aiohttp_transport import AsyncHttpTransport

                self._made = AsyncHttpTransport(self.settings.endpoint, self.settings.headers)
        return self._made
