# SPDX-License-Identifier: Apache-2.0
"""As much of Triton's `triton_python_backend_utils` as model.py uses, and requests as Triton hands them over."""

from __future__ import annotations

from typing import Any

import numpy as np

from frontend_fakes import FakeSender

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    pass


class TritonError:
    """Codes are attributes, as in pb_utils."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int) -> None:
        self.text, self.number = message, code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self.error = output_tensors, error


class MetricFamily:
    """A Triton whose metrics are switched off."""

    COUNTER, GAUGE, HISTOGRAM = range(3)

    def __init__(self, **arguments: Any) -> None:
        raise TritonModelException("metrics are disabled")


class ResponseSender(FakeSender):
    """pb_utils' sender in front of our fake: a response is tensors or an error, and a flag says that it is the last."""

    def send(self, response: InferenceResponse, flags: int = 0) -> None:  # type: ignore[override]
        self.code = response.error.number if response.error else None
        self.message = response.error.text if response.error else ""
        super().send(
            {tensor.name(): tensor.as_numpy() for tensor in response.tensors},
            flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL,
        )


class Request:
    def __init__(self, parameters: str = "{}", **tensors: Any) -> None:
        self.sender = ResponseSender()
        self._parameters = parameters
        self.arrays = {
            name: np.array(
                [value.encode() if isinstance(value, str) else value], dtype=None if value is True else object
            )
            for name, value in tensors.items()
        }

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.arrays.items()]

    def parameters(self) -> str:
        return self._parameters

    def get_response_sender(self) -> ResponseSender:
        return self.sender


class ModelConfig:
    def __init__(self) -> None:
        self.inputs: list[dict] = []
        self.outputs: list[dict] = []

    def add_input(self, tensor: dict) -> None:
        self.inputs.append(tensor)

    def add_output(self, tensor: dict) -> None:
        self.outputs.append(tensor)

    def set_model_transaction_policy(self, policy: dict) -> None:
        self.policy = policy

    def set_max_batch_size(self, size: int) -> None:
        self.max_batch_size = size
