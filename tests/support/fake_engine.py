# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: it speaks the protocol, repeats the prompt's tokens, and fails when told to.

Started like the real one, through `engine_python`, see `frontend_fakes`. What it shall do is in `behaviour.json` in
the folder $FAKE_ENGINE, read anew at each start; what it hears is appended to `heard` there, a line a message.

Adapters are orders: "missing" is refused, "crash" ends the process with the request, "stuck" never answers, "tagged"
has tokens of its own, and "restless" has them whenever a request comes without.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from multilora_backend.added_tokens import AddedToken, AddedTokens
from multilora_backend.core import FinishReason
from multilora_backend.engine.watch import FrontendWatch
from multilora_backend.errors import ErrorCode
from multilora_backend.protocol import (
    Abort,
    AdapterCommand,
    AdapterReply,
    Bye,
    Failed,
    Hello,
    ModelCard,
    Output,
    Outputs,
    Ready,
    Retokenise,
    Stats,
    Submit,
    encoder,
    frontend_decoder,
)


@dataclass
class Stream:
    identity: bytes
    submit: Submit
    index: int
    sent: int = 0


class FakeEngine:
    def __init__(self, address: str, folder: Path, parent: int, server: int) -> None:
        self.folder = folder
        self.behaviour = json.loads((folder / "behaviour.json").read_text())
        self.heard = (folder / "heard").open("a")
        start = {"pid": os.getpid(), "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH")}
        print("Start", json.dumps(start), file=self.heard, flush=True)
        if message := self.behaviour.get("refuse"):
            print(f"multilora engine: {message}", file=sys.stderr)
            sys.exit(2)
        if message := self.behaviour.get("crash"):
            sys.exit(message)
        self.dead: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.watch = FrontendWatch(self.dead.put)
        self.watch.add("launcher", parent, server)
        time.sleep(self.behaviour.get("start_s", 0))
        self.card = msgspec.msgpack.decode((folder / "card").read_bytes(), type=ModelCard)
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM):
            self.socket.setsockopt(option, 0)
        self.socket.bind(address)
        self.names: dict[str, bytes] = {}
        self.streams: dict[tuple[bytes, int, int], Stream] = {}
        self.steps = 0

    def run(self) -> None:
        step_s, next_stats = self.behaviour.get("step_s", 0.002), 0.0
        alive = True
        while alive:
            if self.socket.poll(step_s * 1000 if self.streams else 20):
                identity, frame = self.socket.recv_multipart()
                alive = self.take(identity, frontend_decoder.decode(frame))
                continue
            while not self.dead.empty():
                alive = bool(name := self.dead.get())
                self.names.pop(name, None)
            self.step()
            if time.monotonic() > next_stats:
                next_stats = time.monotonic() + 0.1
                for identity in self.names.values():
                    self.send(identity, self.stats())

    def take(self, identity: bytes, message: object) -> bool:
        print(type(message).__name__, json.dumps(msgspec.to_builtins(message)), file=self.heard, flush=True)
        if isinstance(message, Hello):
            self.names[message.name] = identity
            self.watch.add(message.name, message.pid, message.server_pid, message.serves)
            if message.serves:
                self.watch.remove("launcher")
            self.send(identity, Ready(os.getpid(), self.card))
        elif isinstance(message, Submit):
            if message.adapter == "crash":
                os._exit(9)
            if message.adapter == "missing":
                error = Failed(message.request_id, ErrorCode.NOT_FOUND, "LoRA missing is not supported")
                self.send(identity, error)
            elif (tokens := self.tokens_of(message)).digest != message.tokens_digest:
                self.send(identity, Retokenise(message.request_id, tokens))
            else:
                for index in range(message.sampling.n):
                    self.streams[identity, message.request_id, index] = Stream(identity, message, index)
        elif isinstance(message, Abort):
            for key in list(self.streams):
                if key[:2] == (identity, message.request_id) and message.index in (-1, key[2]):
                    del self.streams[key]
        elif isinstance(message, AdapterCommand):
            self.command(identity, message)
        elif isinstance(message, Bye):
            name = next(name for name, known in self.names.items() if known == identity)
            del self.names[name]
            return self.watch.remove(name) or self.behaviour.get("stay", False)
        return True

    def tokens_of(self, message: Submit) -> AddedTokens:
        tokens = msgspec.convert(self.behaviour.get("tokens", []), list[AddedToken])
        has = message.adapter == "tagged" or (message.adapter == "restless" and not message.tokens_digest)
        return AddedTokens.of(tokens if has else [])

    def command(self, identity: bytes, message: AdapterCommand) -> None:
        """`name` is an order, as for requests; all else is repeated."""
        name = message.arguments.name
        if name == "crash":
            os._exit(9)
        elif name == "missing":
            self.send(identity, Failed(message.request_id, ErrorCode.INVALID_ARG, "LoRA missing is not supported"))
        elif name != "stuck":
            told = {"action": message.action, "token": message.token, **msgspec.to_builtins(message.arguments)}
            self.send(identity, AdapterReply(message.request_id, told))

    def step(self) -> None:
        outputs: dict[bytes, list[Output]] = {}
        for key, stream in list(self.streams.items()):
            submit = stream.submit
            if submit.adapter == "stuck":
                continue
            token = submit.prompt_token_ids[stream.sent % len(submit.prompt_token_ids)]
            stream.sent += 1
            done = stream.sent >= submit.sampling.max_tokens
            reason = FinishReason.LENGTH if done else None
            output = Output(submit.request_id, stream.index, [token], finish_reason=reason)
            outputs.setdefault(stream.identity, []).append(output)
            if done:
                del self.streams[key]
        self.steps += bool(outputs)
        for identity, items in outputs.items():
            self.send(identity, Outputs(items))

    def send(self, identity: bytes, message: object) -> None:
        self.socket.send_multipart([identity, encoder.encode(message)])

    def stats(self) -> Stats:
        running = sorted({stream.submit.adapter for stream in self.streams.values()} - {""})
        return Stats(
            num_running=len(self.streams),
            num_waiting=0,
            num_waiting_adapter=0,
            kv_cache_usage=0.25,
            adapters_by_state={"ACTIVE": len(running), "COLD": 3},
            max_loras=4,
            running_adapters=running,
            waiting_adapters=[],
            steps_total=self.steps,
            preemptions_total=1,
            prefix_cache_queries_total=20,
            prefix_cache_hits_total=10,
            adapter_loads_total=2,
            adapter_load_failures_total=0,
            adapter_evictions_total=0,
            adapter_load_seconds=[],
            adapters_per_step={},
            adapters_per_step_max=len(running),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="module")
    parser.add_argument("--address", required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--server", type=int)
    arguments = parser.parse_args()
    FakeEngine(arguments.address, Path(os.environ["FAKE_ENGINE"]), arguments.parent, arguments.server).run()


if __name__ == "__main__":
    main()
