# SPDX-License-Identifier: Apache-2.0
"""What Triton and the front end cost, on this machine with the example model: `make bench`.

Three figures: server start to ready; responses per second with 64 concurrent gRPC streams; time to first token
through Triton beside the same requests sent straight to the engine's socket. `--json FILE` writes them with the
machine, the versions and the commit.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import report
from engine_socket import engine_process
from traffic import Request, Traffic
from weights import round_robin

from multilora_backend.config import Config
from multilora_backend.frontend.tokenizer import Tokenizer
from multilora_backend.launcher import TritonServer
from multilora_client import AsyncClient, Client

MODEL, ADAPTERS = report.ROOT / "examples/tiny/model", report.ROOT / "examples/tiny/adapters"
NAMES = ("upper", "reverse", "rot13", "double", "devowel", "sort")
STREAMS = 64
TOKENS = 400
WORD = "benchmark"


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


def ttft_engine(settings: dict[str, int], requests: int) -> list[float]:
    """The same requests as `ttft_triton`, submitted as the front end submits them."""
    config = Config.from_mapping({"model": str(MODEL), "adapters": str(ADAPTERS), **settings}, "benchmark")
    with engine_process(config) as engine:
        prompt = Tokenizer(engine.card).encode(WORD)
        traffic = Traffic([Request(WORD, name) for name in round_robin(NAMES, requests)], output=4, concurrency=1)
        records = engine.run(traffic, [prompt] * requests, ignore_eos=False)
    return [record.first - record.submitted for record in records]


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
        through = report.spread(ttft_triton(server.grpc, arguments.requests))
    alone = report.spread(ttft_engine(settings, arguments.requests)[2 * len(NAMES) :])
    rows = [
        ["server start to ready", f"{start_s:.1f} s"],
        [f"responses with {STREAMS} streams", f"{rate['responses_per_s']:.0f} /s"],
        [f"tokens with {STREAMS} streams", f"{rate['tokens_per_s']:.0f} /s"],
    ]
    for name in ("p50_ms", "p90_ms"):
        row = f"{through[name]:.1f} ms - {alone[name]:.1f} ms = {through[name] - alone[name]:.1f} ms"
        rows.append([f"TTFT {name[:3]}: through Triton - engine alone", row])
    report.show("front end and Triton, example model, CPU", ["figure", "value"], rows)
    figures = {"start_to_ready_s": start_s, "streams": STREAMS, **rate, "ttft_triton": through, "ttft_engine": alone}
    report.write(arguments.json, "front_end", sys.argv[1:], arguments, figures=figures)


if __name__ == "__main__":
    main()
