# SPDX-License-Identifier: Apache-2.0
"""The client for threads: blocking calls, streams as iterators."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from multilora_client import settings
from multilora_client.adapters import Adapters
from multilora_client.errors import RequestTimeout, ServerUnavailable
from multilora_client.exchange import Exchange
from multilora_client.settings import Settings
from multilora_client.types import AdapterChoice, Chunk, Completion, Message, SamplingOptions
from multilora_client.wire import RemainingTime, Request, parse_result

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class _Call(Protocol):
    def __next__(self) -> Chunk: ...
    def cancel(self) -> None: ...


class _Transport(Protocol):
    def open(self, request: Request, remaining: RemainingTime) -> _Call: ...
    def ready(self, model: str, timeout: float) -> bool: ...
    def close(self) -> None: ...


class CompletionStream(Iterator[Chunk]):
    """The chunks of one answer as they come; the request is sent by the first `next`.

    Leaving the loop early, `close`, an exception in the loop's body and dropping the last reference all cancel
    the request on the server. Belongs to one thread, but `close` may come from any.
    """

    def __init__(self, transport: _Transport, exchange: Exchange) -> None:
        self._transport = transport
        self._exchange = exchange
        self._call: _Call | None = None
        self._ended = False

    def __next__(self) -> Chunk:
        while not self._ended:
            try:
                self._exchange.start()
                if self._call is None:
                    self._call = self._transport.open(self._exchange.request, self._exchange.remaining)
                    if self._ended:
                        self._call.cancel()
                        break
                return self._exchange.take(next(self._call))
            except StopIteration:
                self._ended = True
            except ServerUnavailable as error:
                self._pause(error)
            except RequestTimeout:
                self.close()
                raise self._exchange.timed_out() from None
            except BaseException:
                # BaseException: Ctrl-C while waiting must reach the server as well.
                self.close()
                raise
        raise StopIteration

    def _pause(self, error: ServerUnavailable) -> None:
        try:
            delay = self._exchange.backoff(error)
            if self._call is not None:
                self._call.cancel()
                self._call = None
            time.sleep(delay)
        except BaseException:
            self.close()
            raise

    def completion(self) -> Completion:
        """Everything so far as one answer; reads the stream to its end unless it was closed."""
        for _ in self:
            pass
        return self._exchange.completion()

    def close(self) -> None:
        """Cancels the request if it still runs; iteration then stops."""
        ended, self._ended = self._ended, True
        if not ended and self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """Talks to one model of one server. Safe to share between threads; any number of requests may run at once.

    >>> with Client("localhost:8001") as client:
    ...     client.generate("hello", adapter="upper", max_tokens=32, temperature=0).text

    See `settings.Settings` for the arguments and `types.SamplingOptions` for the keywords of the methods.
    All methods that generate raise the classes in `errors`, and so do those of `adapters`, the operators' commands.
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
        self.adapters = Adapters(self._command)
        self._transport = _make_transport(self.settings)

    def generate(
        self,
        prompt: str,
        adapter: AdapterChoice | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion:
        """The whole answer to `prompt`, without the prompt; `adapter` None asks the base model, a mapping a sum."""
        return self._open(prompt, adapter, False, timeout, sampling).completion()

    def stream(
        self,
        prompt: str,
        adapter: AdapterChoice | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> CompletionStream:
        """The answer in chunks of new text, as soon as they are there."""
        return self._open(prompt, adapter, True, timeout, sampling)

    def chat(
        self,
        messages: Sequence[Message],
        adapter: AdapterChoice | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion:
        """Like `generate`, with the prompt made from `messages` by the model's chat template."""
        return self._open(messages, adapter, False, timeout, sampling).completion()

    def chat_stream(
        self,
        messages: Sequence[Message],
        adapter: AdapterChoice | None = None,
        *,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> CompletionStream:
        return self._open(messages, adapter, True, timeout, sampling)

    def ready(self, wait_s: float = 0.0) -> bool:
        """Whether the model takes requests; asks again and again for up to `wait_s` seconds until it does."""
        deadline = time.monotonic() + wait_s
        while not self._transport.ready(self.settings.model, settings.READY_TIMEOUT_S):
            if time.monotonic() + settings.READY_POLL_S > deadline:
                return False
            time.sleep(settings.READY_POLL_S)
        return True

    def _command(self, action: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        exchange = self.settings.command(action, arguments)
        stream = CompletionStream(self._transport, exchange)
        return parse_result(stream.completion().text)

    def close(self) -> None:
        """Ends the connection and what still runs on it."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(
        self,
        prompt: str | Sequence[Message],
        adapter: AdapterChoice | None,
        stream: bool,
        timeout: float | None,
        sampling: SamplingOptions,
    ) -> CompletionStream:
        exchange = self.settings.exchange(prompt, adapter, stream=stream, timeout=timeout, sampling=sampling)
        return CompletionStream(self._transport, exchange)


def _make_transport(chosen: Settings) -> _Transport:
    # Imported here so that a protocol's library is loaded only where it is used.
    if chosen.protocol == "grpc":
        from multilora_client.grpc_transport import GrpcTransport

        return GrpcTransport(chosen.endpoint, chosen.headers)
    from multilora_client.http_transport import HttpTransport

    return HttpTransport(chosen.endpoint, chosen.headers)
