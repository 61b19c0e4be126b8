# SPDX-License-Identifier: Apache-2.0
"""What Triton and the front end cost, on this machine with the example model: `make bench`.

Three figures: server start to ready; responses per second with 64 concurrent gRPC streams; time to first token
through Triton beside the same requests sent straight to the engine's socket. `--json FILE` writes them with the
machine, the versions and the commit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import zmq
from rich.console import Console
from rich.table import Table

from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.frontend.tokenizer import Tokenizer
from multilora_backend.launcher import TritonServer
from multilora_backend.protocol import Bye, Hello, Outputs, Ready, Submit, encoder, engine_decoder
from multilora_client import AsyncClient, Client

ROOT = Path(__file__).resolve().parents[1]
MODEL, ADAPTERS = ROOT / "examples/tiny/model", ROOT / "examples/tiny/adapters"
NAMES = ("upper", "reverse", "rot13", "double", "devowel", "sort")
STREAMS = 64
TOKENS = 400
WORD = "benchmark"


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    return {"p50_ms": 1e3 * statistics.median(ordered), "p90_ms": 1e3 * ordered[int(0.9 * len(ordered))]}


async def response_rate(url: str) -> dict[str, float]:
    """64 streams of 400 tokens over all adapters. A response carries several tokens where the front end lags."""
    async with AsyncClient(url, protocol="grpc") as client:
        counts = [0, 0]

        async def stream(i: int) -> None:
            chunks = client.stream(WORD, adapter=NAMES[i % len(NAMES)], max_tokens=TOKENS, ignore_eos=True)
            async for chunk in chunks:
                counts[0] += 1
                counts[1] += chunk.num_output_tokens

        await stream(0)
        counts[:] = 0, 0
        started = time.monotonic()
        await asyncio.gather(*(stream(i) for i in range(STREAMS)))
        seconds = time.monotonic() - started
    return {"responses_per_s": counts[0] / seconds, "tokens_per_s": counts[1] / seconds}


def ttft_triton(url: str, requests: int) -> list[float]:
    """One request at a time: its first response over gRPC."""
    found = []
    with Client(url, protocol="grpc") as client:
        for i in range(requests):
            started = time.monotonic()
            stream = client.stream(WORD, adapter=NAMES[i % len(NAMES)], temperature=0.0, max_tokens=4)
            next(stream)
            found.append(time.monotonic() - started)
            for _ in stream:
                pass
    return found


@contextmanager
def engine(config: Config) -> Iterator[tuple[zmq.Socket[bytes], Ready]]:
    """An engine process without Triton, and a socket to it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(config.to_json())
        address = f"ipc://{folder}/engine.sock"
        command = [sys.executable, "-m", "multilora_backend.engine", "--address", address]
        process = subprocess.Popen([*command, "--config", f"{folder}/config.json", "--parent", str(os.getpid())])
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.connect(address)
        socket.send(encoder.encode(Hello("benchmark", os.getpid(), os.getpid())))
        ready = engine_decoder.decode(socket.recv())
        assert isinstance(ready, Ready)
        yield socket, ready
        socket.send(encoder.encode(Bye()))
        process.wait(10)
        socket.close(linger=0)


def ttft_engine(settings: dict[str, int], requests: int) -> list[float]:
    """The same requests as `ttft_triton`, submitted as the front end submits them."""
    config = Config.from_mapping({"model": str(MODEL), "adapters": str(ADAPTERS), **settings}, "benchmark")
    found = []
    with engine(config) as (socket, ready):
        prompt = Tokenizer(ready.card).encode(WORD)
        sampling = SamplingParams(temperature=0.0, max_tokens=4)
        for i in range(requests):
            started = time.monotonic()
            first: float | None = None
            socket.send(encoder.encode(Submit(i, prompt, sampling, NAMES[i % len(NAMES)])))
            done = False
            while not done:
                message = engine_decoder.decode(socket.recv())
                if isinstance(message, Outputs):
                    first = first or time.monotonic() - started
                    done = any(item.finish_reason for item in message.items)
            assert first is not None
            found.append(first)
    return found


def environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    packages = {name: version(name) for name in ("torch", "transformers", "tritonclient", "numpy")}
    cores = str(os.cpu_count())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "cores": cores,
        "commit": commit.strip(),
    } | {**packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=120, help="requests of the latency figures")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    # One thread: the model is tiny, and the front end and the clients need a core as well.
    settings = {"num_threads": 1}
    log = Path(tempfile.mkdtemp(prefix="multilora-bench-")) / "tritonserver.log"
    with TritonServer(model=MODEL, adapters=ADAPTERS, log=log, settings=settings, drain_s=1) as server:
        start_s = server.wait_ready()
        rate = asyncio.run(response_rate(server.grpc))
        ttft_triton(server.grpc, 2 * len(NAMES))
        through = percentiles(ttft_triton(server.grpc, arguments.requests))
    alone = percentiles(ttft_engine(settings, arguments.requests)[2 * len(NAMES) :])
    table = Table("figure", "value", title="front end and Triton, example model, CPU")
    table.add_row("server start to ready", f"{start_s:.1f} s")
    table.add_row(f"responses with {STREAMS} streams", f"{rate['responses_per_s']:.0f} /s")
    table.add_row(f"tokens with {STREAMS} streams", f"{rate['tokens_per_s']:.0f} /s")
    for name in ("p50_ms", "p90_ms"):
        row = f"{through[name]:.1f} ms - {alone[name]:.1f} ms = {through[name] - alone[name]:.1f} ms"
        table.add_row(f"TTFT {name[:3]}: through Triton - engine alone", row)
    Console().print(table)
    figures = {"start_to_ready_s": start_s, "streams": STREAMS, **rate, "ttft_triton": through, "ttft_engine": alone}
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
