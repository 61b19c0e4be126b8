# SPDX-License-Identifier: Apache-2.0
"""Between pb_utils and our types, for every model.py. pb_utils is handed in: only Triton's stub can import it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.frontend.outbox import Sender
from multilora_backend.frontend.tensors import json_value

log = logging.getLogger(__name__)


class TritonSender:
    """outbox.Sender over pb_utils. One thread of a process alone may call its senders, see `outbox`."""

    def __init__(self, pb_utils: ModuleType, sender: Any) -> None:
        self._pb_utils = pb_utils
        self._sender = sender

    def send(self, tensors: dict[str, np.ndarray], final: bool) -> None:
        outputs = [self._pb_utils.Tensor(name, value) for name, value in tensors.items()]
        flags = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        self._sender.send(self._pb_utils.InferenceResponse(outputs), flags=flags)

    def fail(self, error: MultiloraError) -> None:
        code = getattr(self._pb_utils.TritonError, error.code.value)
        response = self._pb_utils.InferenceResponse([], self._pb_utils.TritonError(error.text, code))
        self._sender.send(response, flags=self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


def read(
    pb_utils: ModuleType, request: Any, refuse: Callable[[Sender, MultiloraError], None]
) -> tuple[dict[str, np.ndarray], dict[str, object], TritonSender] | None:
    """Tensors, parameters and sender of one request. One that cannot be read is refused, and the answer is None."""
    sender = TritonSender(pb_utils, request.get_response_sender())
    try:
        # Copied, since an array of numbers is a view of shared memory that goes when the request does.
        tensors = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
        # A key that comes twice is a parameter of the client's that is spelled like a forwarded header.
        parameters = json_value("parameters", request.parameters() or "{}")
        assert isinstance(parameters, dict)
        return tensors, parameters, sender
    except (pb_utils.TritonModelException, MultiloraError, ValueError) as error:
        refuse(sender, invalid("request", f"cannot be read: {error}"))
    except Exception as error:  # one unreadable request must not fail the others of its call
        log.exception("a request could not be read")
        refuse(sender, MultiloraError(ErrorCode.INTERNAL, f"the request could not be read: {error}"))
    return None
