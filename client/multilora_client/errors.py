# SPDX-License-Identifier: Apache-2.0
"""One exception class for each thing a caller can do about a failure, the same for gRPC and HTTP."""

from __future__ import annotations

import re


class MultiloraClientError(Exception):
    """Base of all errors that a client raises. `message` is the server's sentence where it has one."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(MultiloraClientError):
    """The request is wrong and stays wrong: the message names the field and the limit."""


class NotFound(MultiloraClientError):
    """The server has no such model."""


class AdapterNotFound(NotFound):
    """The model is there, but it has no such adapter."""


class ServerUnavailable(MultiloraClientError):
    """Nobody answers, or the server cannot take requests now. Retried while no token has arrived."""


class RequestCancelled(MultiloraClientError):
    """The server, or another thread of this process, ended the request."""


class RequestTimeout(MultiloraClientError):
    """The request's own deadline passed; the server is told to drop it."""


class ServerError(MultiloraClientError):
    """The server failed, or said something that this client does not understand."""


CANCELLED_HERE = "the request was cancelled by this client"

_CLASSES: dict[str, type[MultiloraClientError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "UNIMPLEMENTED": InvalidRequest,
    "NOT_FOUND": NotFound,
    "UNAVAILABLE": ServerUnavailable,
    "CANCELLED": RequestCancelled,
    "DEADLINE_EXCEEDED": RequestTimeout,
}

# Triton drops the code of an error in three places: /generate and /generate_stream answer 400 whatever the
# model's code was (seen with 2.51), an error inside an SSE stream is text alone, and so is a request that
# Triton itself refuses on a gRPC stream. There the text must tell.
# All patterns are anchored or Triton's own, because messages quote what clients sent.
_CODE_OF_TEXT = (
    (re.compile(r"^(unavailable\b|too many waiting requests)", re.IGNORECASE), "UNAVAILABLE"),
    (re.compile(r"^Request for unknown model.* is not at ready state"), "UNAVAILABLE"),
    (re.compile(r"^Failed to process the request.* is not healthy", re.DOTALL), "UNAVAILABLE"),
    (re.compile(r"^Server is stopping"), "UNAVAILABLE"),
    (re.compile(r"^Request for unknown model"), "NOT_FOUND"),
    (re.compile(r"^LoRA .* is not supported", re.DOTALL), "NOT_FOUND"),
    (re.compile(r"^LoRA .* could not be loaded", re.DOTALL), "INTERNAL"),
    (re.compile(r"^Request was cancelled"), "CANCELLED"),
    (re.compile(r"^(internal\b|Failed to process the request)", re.IGNORECASE), "INTERNAL"),
)


def code_of_text(message: str, default: str) -> str:
    """The gRPC code name of an error that came without one; `default` if its text is not known."""
    return next((code for pattern, code in _CODE_OF_TEXT if pattern.search(message)), default)


def error_of(code: str, message: str, adapter: str | None) -> MultiloraClientError:
    """The exception for a gRPC code name. A model that is there can only miss the adapter asked for."""
    if code == "NOT_FOUND" and adapter and "unknown model" not in message:
        return AdapterNotFound(message)
    return _CLASSES.get(code, ServerError)(message)
