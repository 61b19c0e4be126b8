# SPDX-License-Identifier: Apache-2.0
"""The errors a client or an operator may see: one class, one code each, one sentence that names the field."""

from __future__ import annotations

from enum import Enum


class ErrorCode(str, Enum):
    """Codes by the names that Triton's `TritonError` constants have, so that the bridge only looks them up."""

    INVALID_ARG = "INVALID_ARG"
    NOT_FOUND = "NOT_FOUND"
    UNAVAILABLE = "UNAVAILABLE"
    UNSUPPORTED = "UNSUPPORTED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class MultiloraError(Exception):
    """An error with a code and a message that is shown to a client as it is."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def text(self) -> str:
        """What a client reads. Triton drops codes over HTTP, so those that a client may act on are said in words."""
        said = self.code in (ErrorCode.UNAVAILABLE, ErrorCode.INTERNAL)
        return f"{self.code.value.lower()}: {self.message}" if said else self.message


def invalid(field: str, problem: str) -> MultiloraError:
    """The error for bad input: `invalid("top_p", "must be in (0, 1], got 3.0")`."""
    return MultiloraError(ErrorCode.INVALID_ARG, f"{field}: {problem}")
