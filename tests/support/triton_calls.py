# SPDX-License-Identifier: Apache-2.0
"""Requests by plain tritonclient and plain HTTP, as somebody who does not have our client sends them."""

from __future__ import annotations

import http.client
import json
import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

MODEL = "multilora"


@dataclass
class Answer:
    """What came back for one gRPC request."""

    responses: list[dict[str, list]] = field(default_factory=list)
    """One a response, by output tensor."""
    error: InferenceServerException | None = None
    finals: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def text(self) -> str:
        return "".join(r["text_output"][0] for r in self.responses)


def tensors(values: dict[str, Any]) -> list[grpcclient.InferInput]:
    inputs = []
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            array = value
        elif isinstance(value, bool):
            array = np.array([value])
        else:
            array = np.array([value if isinstance(value, bytes) else str(value).encode()], dtype=object)
        kind = {"b": "BOOL", "O": "BYTES", "i": "INT32", "f": "FP32"}[array.dtype.kind]
        tensor = grpcclient.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _decoded(result: grpcclient.InferResult) -> dict[str, list]:
    out = {}
    for output in result.get_response().outputs:
        values = result.as_numpy(output.name).tolist()
        out[output.name] = [v.decode() if isinstance(v, bytes) else v for v in values]
    return out


class Stream:
    """One gRPC stream that carries any number of requests at the same time."""

    def __init__(self, url: str, codes: bool = True) -> None:
        """`codes`: errors as gRPC statuses, which end the stream; else Triton sends their text and keeps it open."""
        # A connection of its own, as another client has it: gRPC shares one among all channels of a process, and
        # when the server drops that, every stream on it ends.
        self._client = grpcclient.InferenceServerClient(url, channel_args=[("grpc.use_local_subchannel_pool", 1)])
        self._answers: dict[str, Answer] = {}
        self._ended: InferenceServerException | None = None
        self._client.start_stream(self._receive, headers={"triton_grpc_error": "true"} if codes else None)

    def send(self, values: dict[str, Any], parameters: dict[str, Any] | None = None) -> Answer:
        request_id = str(len(self._answers) + 1)
        answer = self._answers[request_id] = Answer()
        try:
            self._client.async_stream_infer(
                MODEL,
                tensors(values),
                request_id=request_id,
                parameters=parameters,
                enable_empty_final_response=True,
            )
        except InferenceServerException as error:
            raise RuntimeError(f"the stream ended before anything was sent: {self._ended}") from error
        return answer

    def _receive(self, result: grpcclient.InferResult | None, error: InferenceServerException | None) -> None:
        if result is None:
            self._ended = error
            # tritonclient gives errors no request id, and with the header above one ends the stream.
            for answer in self._answers.values():
                if not answer.done.is_set():
                    answer.error = error
                    answer.done.set()
            return
        response = result.get_response()
        answer = self._answers[response.id]
        if response.outputs:
            answer.responses.append(_decoded(result))
        if response.parameters["triton_final_response"].bool_param:
            answer.finals += 1
            answer.done.set()

    def close(self, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def grpc_call(
    url: str,
    values: dict[str, Any],
    parameters: dict[str, Any] | None = None,
    timeout: float = 60,
    codes: bool = True,
) -> Answer:
    """One request on a stream of its own, answered or refused."""
    stream = Stream(url, codes)
    try:
        answer = stream.send(values, parameters)
        assert answer.done.wait(timeout), "no final response came"
        return answer
    finally:
        stream.close()


def http_post(url: str, path: str, body: dict[str, Any] | bytes, timeout: float = 60) -> tuple[int, str]:
    """Status and body of a POST to `/v2/models/multilora/PATH`."""
    host, port = url.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", f"/v2/models/{MODEL}/{path}", data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def http_events(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of `/generate_stream`."""
    status, text = http_post(url, "generate_stream", body)
    assert status == 200, text
    return [json.loads(line[len("data: ") :]) for line in text.splitlines() if line.startswith("data: ")]


def in_threads(calls: Iterable[Any]) -> list[Any]:
    """Results of callables that run at the same time, in order. An exception in one is raised here."""
    calls = list(calls)
    results: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def run(index: int) -> None:
        try:
            results.put((index, calls[index](), None))
        except BaseException as error:
            results.put((index, None, error))

    for index in range(len(calls)):
        threading.Thread(target=run, args=(index,), daemon=True).start()
    collected = [results.get(timeout=120) for _ in calls]
    for _, _, error in collected:
        if error is not None:
            raise error
    return [value for _, value, _ in sorted(collected, key=lambda item: item[0])]
