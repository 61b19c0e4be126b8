# SPDX-License-Identifier: Apache-2.0
"""HTTP for asyncio, with the aiohttp that tritonclient[http] brings; see `http_transport`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import SplitResult

import aiohttp

from multilora_client.errors import (
    CANCELLED_HERE,
    MultiloraClientError,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)
from multilora_client.http_transport import (
    decode_event,
    encode_body,
    error_of_status,
    model_path,
)
from multilora_client.types import Chunk
from multilora_client.wire import EventParser, RemainingTime, Request


class AsyncHttpTransport:
    """Belongs to the event loop that runs when it is made."""

    def __init__(self, endpoint: SplitResult, headers: Mapping[str, str]) -> None:
        self._endpoint = endpoint
        self._origin = f"{endpoint.scheme}://{endpoint.netloc}"
        self._session = aiohttp.ClientSession(
            # No limit: with aiohttp's 100 the 101st stream would wait for another to end. No reuse: a POST on a
            # connection that the server is just closing fails, and must not be sent again by guess.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            headers={"Content-Type": "application/json", **headers},
        )

    def open(self, request: Request, remaining: RemainingTime) -> AsyncHttpCall:
        path = model_path(self._endpoint, request.model, "generate_stream")
        response = self._session.post(
            self._origin + path,
            data=encode_body(request),
            timeout=aiohttp.ClientTimeout(total=remaining()),
        )
        return AsyncHttpCall(asyncio.ensure_future(response), request)

    async def ready(self, model: str, timeout: float) -> bool:
        url = self._origin + model_path(self._endpoint, model, "ready")
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=timeout)) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False

    async def close(self) -> None:
        await self._session.close()


class AsyncHttpCall:
    def __init__(self, opening: asyncio.Future[aiohttp.ClientResponse], request: Request) -> None:
        self._opening = opening
        """Done when the status is known, which is when the first token is."""
        self._request = request
        self._parser = EventParser()
        self._events: list[str] = []
        self._cancelled = False

    async def __anext__(self) -> Chunk:
        while not self._events:
            data = await self._read()
            if not data:
                raise StopAsyncIteration
            self._events += self._parser.feed(data)
        return decode_event(self._events.pop(0), self._request)

    async def _read(self) -> bytes:
        """Some bytes of the body, or none at its end."""
        try:
            response = await self._opening
            if response.status != 200:
                raise error_of_status(response.status, await response.read(), self._request)
            return await response.content.readany()
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, asyncio.CancelledError) as error:
            if self._cancelled:
                raise RequestCancelled(CANCELLED_HERE) from None
            if isinstance(error, asyncio.CancelledError):
                raise
            raise _error_of_io(error) from error

    def cancel(self) -> None:
        self._cancelled = True
        if not self._opening.cancel() and not self._opening.cancelled() and not self._opening.exception():
            self._opening.result().close()


def _error_of_io(error: Exception) -> MultiloraClientError:
    # asyncio's TimeoutError is a class of its own before Python 3.11.
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return RequestTimeout(str(error))
    if isinstance(error, (OSError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)):
        return ServerUnavailable(f"connection failed: {error}")
    return ServerError(f"not an HTTP response: {error!r}")
