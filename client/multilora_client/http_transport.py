# SPDX-License-Identifier: Apache-2.0
"""HTTP: Triton's generate extension, one connection per request, so that closing it cancels the request.

Always /generate_stream: Triton (2.51) notices that a client is gone only when it fails to write to it, so a
request on /generate would run to its end whatever its client does.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, quote

from multilora_client.errors import (
    CANCELLED_HERE,
    MultiloraClientError,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    code_of_text,
    error_of,
)
from multilora_client.types import Chunk
from multilora_client.wire import EventParser, RemainingTime, Request, parse_chunk

_READ_BYTES = 64 * 1024

_CODE_OF_STATUS = {
    404: "NOT_FOUND",
    408: "UNAVAILABLE",
    429: "UNAVAILABLE",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "UNAVAILABLE",
}


def model_path(endpoint: SplitResult, model: str, verb: str) -> str:
    """Below the url's own path, for servers behind a reverse proxy."""
    return f"{endpoint.path.rstrip('/')}/v2/models/{quote(model, safe='')}/{verb}"


def encode_body(request: Request) -> bytes:
    return json.dumps(dict(request.tensors), ensure_ascii=False).encode()


def decode_event(event: str, request: Request) -> Chunk:
    """A Chunk from the data of one server-sent event; raises the error that the event reports."""
    body = _loads(event)
    if not isinstance(body, dict):
        raise ServerError(f"an event that is not a JSON object: {event[:200]}")
    if "error" in body:
        message = str(body["error"])
        raise error_of(code_of_text(message, "INTERNAL"), message, request.adapter)
    outputs = {name: value if isinstance(value, list) else [value] for name, value in body.items()}
    return parse_chunk(outputs, final=False, output=request.output)


def error_of_status(status: int, body: bytes, request: Request) -> MultiloraClientError:
    """The error of a response that is not 200; /generate_stream writes its JSON as an event, too."""
    text = next(EventParser().feed(body), None) or body.decode("utf-8", "replace").strip()
    parsed = _loads(text)
    message = str(parsed["error"]) if isinstance(parsed, dict) and "error" in parsed else text[:500]
    if status == 400:
        code = code_of_text(message, "INVALID_ARGUMENT")
    elif status in _CODE_OF_STATUS:
        code = _CODE_OF_STATUS[status]
    else:
        code = "INVALID_ARGUMENT" if 400 <= status < 500 else code_of_text(message, "INTERNAL")
    return error_of(code, message or f"HTTP status {status}", request.adapter)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


class HttpTransport:
    def __init__(self, endpoint: SplitResult, headers: Mapping[str, str]) -> None:
        self._endpoint = endpoint
        self._headers = {"Content-Type": "application/json", **headers}
        self._calls: weakref.WeakSet[HttpCall] = weakref.WeakSet()

    def _connection(self, timeout: float | None) -> http.client.HTTPConnection:
        host, port = self._endpoint.hostname or "", self._endpoint.port
        if self._endpoint.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=timeout)

    def open(self, request: Request, remaining: RemainingTime) -> HttpCall:
        connection = self._connection(remaining())
        try:
            connection.connect()
            path = model_path(self._endpoint, request.model, "generate_stream")
            connection.request("POST", path, encode_body(request), self._headers)
        except BaseException as error:
            # BaseException: Ctrl-C must not leave the connection, and with it the request, to the collector.
            connection.close()
            if isinstance(error, (OSError, http.client.HTTPException)):
                raise _error_of_io(error) from error
            raise
        call = HttpCall(connection, request, remaining)
        self._calls.add(call)
        return call

    def ready(self, model: str, timeout: float) -> bool:
        connection = self._connection(timeout)
        try:
            connection.request("GET", model_path(self._endpoint, model, "ready"), headers=self._headers)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def close(self) -> None:
        for call in list(self._calls):
            call.cancel()


class HttpCall:
    """The responses of one request, for one consumer; `cancel` may come from any thread."""

    def __init__(self, connection: http.client.HTTPConnection, request: Request, remaining: RemainingTime) -> None:
        self._connection = connection
        self._socket: socket.socket = connection.sock
        self._request = request
        self._remaining = remaining
        self._response: http.client.HTTPResponse | None = None
        self._parser = EventParser()
        self._events: list[str] = []
        self._cancelled = False
        self._reading = threading.Lock()

    def __next__(self) -> Chunk:
        while not self._events:
            data = self._read()
            if not data:
                raise StopIteration
            self._events += self._parser.feed(data)
        return decode_event(self._events.pop(0), self._request)

    def _read(self) -> bytes:
        """Some bytes of the body, or none at its end."""
        with self._reading:
            try:
                data = self._receive()
            except BaseException as error:
                # BaseException: Ctrl-C must not leave the connection, and with it the request, to the collector.
                self._connection.close()
                if not isinstance(error, (OSError, http.client.HTTPException)):
                    raise
                if self._cancelled:
                    raise RequestCancelled(CANCELLED_HERE) from None
                raise _error_of_io(error) from error
            if self._cancelled or not data:
                self._connection.close()
        if self._cancelled:
            raise RequestCancelled(CANCELLED_HERE)
        return data

    def _receive(self) -> bytes:
        self._socket.settimeout(self._remaining())
        if self._response is None:
            self._response = self._connection.getresponse()
            if self._response.status != 200:
                raise error_of_status(self._response.status, self._response.read(), self._request)
            self._socket.settimeout(self._remaining())
        return self._response.read1(_READ_BYTES)

    def cancel(self) -> None:
        self._cancelled = True
        # Wakes a thread that waits in recv; that thread then closes, since under it the descriptor must not
        # become some other connection's.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._reading.acquire(blocking=False):
            self._connection.close()
            self._reading.release()


def _error_of_io(error: Exception) -> MultiloraClientError:
    if isinstance(error, TimeoutError):
        return RequestTimeout(str(error))
    if isinstance(error, (OSError, http.client.IncompleteRead)):
        return ServerUnavailable(f"connection failed: {error}")
    return ServerError(f"not an HTTP response: {error!r}")
