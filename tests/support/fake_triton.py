# SPDX-License-Identifier: Apache-2.0
"""A fake Triton on loopback, gRPC and HTTP, that plays scripts and behaves as Triton 2.51 was seen to."""

from __future__ import annotations

import json
import queue
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

HANG_S = 10.0
"""Longer than any test: a script that hangs ends because its client went away, or the test fails."""


@dataclass(frozen=True)
class Reply:
    """One response; the first step that says `final` ends the script."""

    text: str | list[str] = ""
    reason: str = "None"
    tokens: int = 1
    final: bool = False
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def outputs(self) -> dict[str, list[Any]]:
        texts = [self.text] if isinstance(self.text, str) else self.text
        return {
            "text_output": texts,
            "finish_reason": [self.reason] * len(texts),
            "num_input_tokens": [7],
            "num_output_tokens": [self.tokens] * len(texts),
            **self.extra,
        }


@dataclass(frozen=True)
class Fail:
    """A model's error, or with `refused` one that Triton gives itself: then gRPC carries no code for it."""

    code: str
    text: str
    refused: bool = False


@dataclass(frozen=True)
class Hang:
    """Waits until the client is gone."""


@dataclass(frozen=True)
class Drop:
    """Breaks the connection without a word (HTTP only)."""


@dataclass(frozen=True)
class Pause:
    seconds: float


Step = Reply | Fail | Hang | Drop | Pause
HTTP_STATUS = {"NOT_FOUND": 404, "UNAVAILABLE": 503}


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, port: int = 0) -> None:
        """With a port, both protocols have it, on 127.0.0.1 (gRPC) and 127.0.0.2 (HTTP)."""
        self.scripts: deque[list[Step]] = deque()
        """One for each attempt; the last one is played for all attempts that follow."""
        self.received: list[dict[str, Any]] = []
        """Tensors by name of each attempt, plus "model" and "headers"."""
        self.cancelled: queue.Queue[str] = queue.Queue()
        """The adapter of each request whose client went away while it hung."""
        self.ready = True
        self.split = 0
        """Size of the HTTP chunks, so that characters and events are cut; 0 for one chunk an event."""
        self._lock = threading.Lock()

        self._grpc = grpc.server(ThreadPoolExecutor(40), options=[("grpc.max_receive_message_length", -1)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._grpc)
        grpc_port = self._grpc.add_insecure_port(f"127.0.0.1:{port}")
        self._grpc.start()
        self._http = _HttpServer(("127.0.0.2" if port else "127.0.0.1", port), _handler_for(self))
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.urls = {
            "grpc": f"127.0.0.1:{grpc_port}",
            "http": f"{self._http.server_address[0]}:{self._http.server_address[1]}",
        }

    def play(self, *scripts: list[Step]) -> None:
        self.scripts = deque(scripts)

    def next_script(self, received: dict[str, Any]) -> list[Step]:
        with self._lock:
            self.received.append(received)
            return self.scripts.popleft() if len(self.scripts) > 1 else self.scripts[0]

    def expect_cancelled(self) -> str:
        """The adapter of a request whose client has gone away; fails if none does within seconds."""
        return self.cancelled.get(timeout=5)

    def expect_received(self) -> None:
        """Waits for a request; fails if none comes within seconds."""
        deadline = time.monotonic() + 10
        while not self.received:
            assert time.monotonic() < deadline, "no request has come"
            time.sleep(0.01)

    def stop(self) -> None:
        self._grpc.stop(0)
        self._http.shutdown()
        self._http.server_close()

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.ready and request.name == "multilora")

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        request = next(requests)
        metadata = dict(context.invocation_metadata())
        received: dict[str, Any] = {"model": request.model_name, "headers": metadata}
        for tensor in request.inputs:
            assert list(tensor.shape) == [1]
            if tensor.datatype == "BOOL":
                (received[tensor.name],) = tensor.contents.bool_contents
            else:
                assert tensor.datatype == "BYTES"
                (received[tensor.name],) = (b.decode() for b in tensor.contents.bytes_contents)
        ended, gone = threading.Event(), threading.Event()

        def on_end() -> None:
            # gRPC drops this generator when the client goes, wherever it stands: only a callback hears of it.
            gone.set()
            if not ended.is_set():
                self.cancelled.put(received.get("lora_name", ""))

        context.add_callback(on_end)
        for step in self.next_script(received):
            if isinstance(step, Reply):
                yield _grpc_reply(step)
            elif isinstance(step, Hang):
                gone.wait(HANG_S)
            elif isinstance(step, Pause):
                time.sleep(step.seconds)
            elif isinstance(step, Fail):
                ended.set()
                if not step.refused and metadata.get("triton_grpc_error") == "true":
                    context.abort(grpc.StatusCode[step.code], step.text)
                yield service_pb2.ModelStreamInferResponse(error_message=step.text)
                return
        ended.set()


def _grpc_reply(step: Reply) -> Any:
    response = service_pb2.ModelStreamInferResponse()
    infer = response.infer_response
    infer.parameters["triton_final_response"].bool_param = step.final
    for name, values in step.outputs().items():
        if isinstance(values[0], str):
            raw = b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in values)
            infer.outputs.add(name=name, datatype="BYTES", shape=[len(values)])
        else:
            kind, datatype = ("f", "FP32") if isinstance(values[0], float) else ("I", "UINT32")
            raw = struct.pack(f"<{len(values)}{kind}", *values)
            infer.outputs.add(name=name, datatype=datatype, shape=[len(values)])
        infer.raw_output_contents.append(raw)
    return response


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def _handler_for(fake: FakeTriton) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            good = self.path == "/v2/models/multilora/ready" and fake.ready
            self.send_response(200 if good else 400)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode())
            _, v2, models, model, verb = self.path.split("/")
            assert (v2, models, verb) == ("v2", "models", "generate_stream")
            body |= {"model": model, "headers": {k.lower(): v for k, v in self.headers.items()}}
            try:
                self._play(fake.next_script(body), model)
            except ConnectionError:
                fake.cancelled.put(body.get("lora_name", ""))
                self.close_connection = True

        def _play(self, script: list[Step], model: str) -> None:
            started = False
            for step in script:
                if isinstance(step, Hang):
                    if select.select([self.connection], [], [], HANG_S)[0]:
                        raise ConnectionResetError
                    return
                if isinstance(step, Drop):
                    self.close_connection = True
                    return
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                    continue
                if not started:
                    self._start(step)
                    started = True
                if isinstance(step, Reply):
                    outputs = {k: v[0] if len(v) == 1 else v for k, v in step.outputs().items()}
                    self._event({"model_name": model, "model_version": "1", **outputs})
                else:
                    self._event({"error": step.text})
            self.wfile.write(b"0\r\n\r\n")

        def _start(self, step: Step) -> None:
            # Triton answers 400 to a model's error whatever its code; its own refusals have their status.
            status = 200
            if isinstance(step, Fail):
                status = HTTP_STATUS.get(step.code, 400) if step.refused else 400
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def _event(self, body: dict[str, Any]) -> None:
            data = b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"
            size = fake.split or len(data)
            for at in range(0, len(data), size):
                part = data[at : at + size]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                self.wfile.flush()

    return Handler
