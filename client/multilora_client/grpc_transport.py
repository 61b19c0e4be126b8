# SPDX-License-Identifier: Apache-2.0
"""gRPC: one ModelStreamInfer call per request on one shared channel, so that ending the call cancels it.

tritonclient's own InferenceServerClient allows one stream per client object and cancels all of its requests
together; its generated messages are used here without it.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult

import grpc
from tritonclient.grpc import service_pb2

from multilora_client.errors import (
    CANCELLED_HERE,
    MultiloraClientError,
    RequestCancelled,
    ServerError,
    code_of_text,
    error_of,
)
from multilora_client.types import Chunk
from multilora_client.wire import RemainingTime, Request, parse_chunk

_SERVICE = "/inference.GRPCInferenceService"
_OPTIONS = [
    # Each client has its own connection, and sees a restarted server as soon as its own retries look for it:
    # by default a channel refuses for a second and then ever longer without trying.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # As over HTTP: an inference server is a neighbour, http_proxy is for the world outside.
    ("grpc.enable_http_proxy", 0),
]
_FORMATS = {"FP32": "<%df", "FP64": "<%dd", "INT32": "<%di", "UINT32": "<%dI", "INT64": "<%dq", "UINT64": "<%dQ"}


class _Common:
    """What the two transports share: the methods of a channel, and what is sent with each call."""

    def __init__(self, channel: Any, headers: Mapping[str, str]) -> None:
        self._channel = channel
        # Without `triton_grpc_error: true`, which would make errors gRPC statuses: tritonserver 2.51 aborted when
        # streams with it ended in errors beside busy ones (GRPC_CALL_ERROR_TOO_MANY_OPERATIONS). Texts tell the code.
        self._metadata = [(k.lower(), v) for k, v in headers.items()]
        # One request a call: a bidirectional method whose client half-closes after one message looks the same
        # on the wire as a unary-stream method, and that form needs no thread to feed the call.
        self._infer = channel.unary_stream(
            f"{_SERVICE}/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._model_ready = channel.unary_unary(
            f"{_SERVICE}/ModelReady",
            request_serializer=service_pb2.ModelReadyRequest.SerializeToString,
            response_deserializer=service_pb2.ModelReadyResponse.FromString,
        )


class GrpcTransport(_Common):
    def __init__(self, endpoint: SplitResult, headers: Mapping[str, str]) -> None:
        if endpoint.scheme == "grpcs":
            channel = grpc.secure_channel(endpoint.netloc, grpc.ssl_channel_credentials(), _OPTIONS)
        else:
            channel = grpc.insecure_channel(endpoint.netloc, _OPTIONS)
        super().__init__(channel, headers)

    def open(self, request: Request, remaining: RemainingTime) -> GrpcCall:
        call = self._infer(_encode(request), timeout=remaining(), metadata=self._metadata)
        return GrpcCall(call, request)

    def ready(self, model: str, timeout: float) -> bool:
        message = service_pb2.ModelReadyRequest(name=model)
        try:
            return self._model_ready(message, timeout=timeout, metadata=self._metadata).ready
        except grpc.RpcError:
            return False

    def close(self) -> None:
        self._channel.close()


class GrpcCall:
    """The responses of one request, for one consumer; `cancel` may come from any thread."""

    def __init__(self, call: Any, request: Request) -> None:
        self._call = call
        self._request = request
        self._answered = False

    def __next__(self) -> Chunk:
        try:
            response = next(self._call)
        except grpc.RpcError as error:
            raise _error_of_call(error, self._request) from None
        chunk = _decode(response, self._request, self._answered)
        self._answered = True
        return chunk

    def cancel(self) -> None:
        self._call.cancel()


class AsyncGrpcTransport(_Common):
    """Belongs to the event loop that runs when it is made."""

    def __init__(self, endpoint: SplitResult, headers: Mapping[str, str]) -> None:
        if endpoint.scheme == "grpcs":
            channel = grpc.aio.secure_channel(endpoint.netloc, grpc.ssl_channel_credentials(), _OPTIONS)
        else:
            channel = grpc.aio.insecure_channel(endpoint.netloc, _OPTIONS)
        super().__init__(channel, headers)

    def open(self, request: Request, remaining: RemainingTime) -> AsyncGrpcCall:
        call = self._infer(_encode(request), timeout=remaining(), metadata=self._metadata)
        return AsyncGrpcCall(call, request)

    async def ready(self, model: str, timeout: float) -> bool:
        message = service_pb2.ModelReadyRequest(name=model)
        try:
            return (await self._model_ready(message, timeout=timeout, metadata=self._metadata)).ready
        except grpc.RpcError:
            return False

    async def close(self) -> None:
        await self._channel.close()


class AsyncGrpcCall:
    def __init__(self, call: Any, request: Request) -> None:
        self._call = call
        self._request = request
        self._answered = False
        self._cancelled = False

    async def __anext__(self) -> Chunk:
        try:
            response = await self._call.read()
        except asyncio.CancelledError:
            # Raised for the task's cancellation and for the call's own, which is no reason to end the task.
            if self._cancelled:
                raise RequestCancelled(CANCELLED_HERE) from None
            raise
        except grpc.RpcError as error:
            raise _error_of_call(error, self._request) from None
        if response is grpc.aio.EOF:
            raise StopAsyncIteration
        chunk = _decode(response, self._request, self._answered)
        self._answered = True
        return chunk

    def cancel(self) -> None:
        self._cancelled = True
        self._call.cancel()


def _encode(request: Request) -> Any:
    message = service_pb2.ModelInferRequest(model_name=request.model)
    for name, value in request.tensors.items():
        if isinstance(value, bool):
            tensor = message.inputs.add(name=name, datatype="BOOL", shape=[1])
            tensor.contents.bool_contents.append(value)
        else:
            tensor = message.inputs.add(name=name, datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(value.encode())
    return message


def _decode(response: Any, request: Request, answered: bool) -> Chunk:
    if response.error_message:
        # From the model, or Triton refused the request itself (unknown model, wrong shape).
        code = code_of_text(response.error_message, "INTERNAL" if answered else "INVALID_ARGUMENT")
        raise error_of(code, response.error_message, request.adapter)
    infer = response.infer_response
    outputs = {
        output.name: _values(output.name, output.datatype, raw)
        for output, raw in zip(infer.outputs, infer.raw_output_contents, strict=True)
    }
    return parse_chunk(outputs, infer.parameters["triton_final_response"].bool_param, request.output)


def _values(name: str, datatype: str, raw: bytes) -> Sequence[Any]:
    """Triton's raw layout: little-endian numbers; BYTES elements each after their length as uint32."""
    if datatype != "BYTES":
        layout = _FORMATS.get(datatype)
        if layout is None:
            raise ServerError(f"output {name} has the unexpected type {datatype}")
        return struct.unpack(layout % (len(raw) // struct.calcsize(layout % 1)), raw)
    values, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        values.append(raw[at : at + size].decode("utf-8", "replace"))
        at += size
    return values


def _error_of_call(error: Any, request: Request) -> MultiloraClientError:
    code, message = error.code().name, error.details() or ""
    if code == "CANCELLED" and message.startswith("Locally cancelled"):
        return RequestCancelled(CANCELLED_HERE)
    return error_of(code, message or code, request.adapter)
