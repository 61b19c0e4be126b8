# SPDX-License-Identifier: Apache-2.0
"""The same traffic to the engine alone and through tritonserver and the front end, streamed over gRPC.

Closed traffic (`--streams` requests in flight) gives throughput. Open traffic (Poisson arrivals at `--rate` requests a
second; by default 0.7 of what the engine alone completed) gives the time to the first token (TTFT), which under closed
traffic is mostly the wait for the others' prompts. The engine alone gets tokens over the socket that front ends use.

The model has random weights at `--shape`, or is `--model` with `--adapters`. Interpreters may differ: $ENGINE_PYTHON
runs the engine, $TRITON_STUB_ENV/bin/python3 the front end and the clients; see `multilora_backend.tritonserver`.

    python benchmarks/through_triton.py --shape llama-3.1-8b --input 256 --output 256
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import report
import tables
import torch
from client_processes import Clients, check_interpreters, cpu_seconds
from engine_socket import engine_process
from shapes import SHAPES
from traffic import Prompts, Record, Request, Traffic, poisson, tokens_per_s
from weights import Workdir, adapter_name, device_bytes, round_robin, settings_for

from multilora_backend.config import Config
from multilora_backend.frontend.tokenizer import Tokenizer
from multilora_backend.launcher import TritonServer

WARM_UP_TOKENS = 4
OPEN_SHARE = 0.7
"""Of the closed rate: below it queues stay short, so that TTFT shows the path and not the load."""


@dataclass(frozen=True)
class Served:
    """What is served, the same on both ways."""

    settings: dict[str, object]
    adapters: list[str]
    prompts: Prompts | None
    """None: every prompt is `--prompt`."""

    def traffic(self, options: argparse.Namespace, count: int, output: int) -> Traffic:
        prompt = self.prompts or (lambda: str(options.prompt))
        names = round_robin(self.adapters or [""], count)
        return Traffic([Request(prompt(), name) for name in names], output, options.streams)


def alone(served: Served, options: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Figures of the engine, and the rate of open traffic."""
    config = Config.from_mapping(served.settings, "benchmark")
    with engine_process(config, os.environ.get("ENGINE_PYTHON", sys.executable)) as engine:
        tokenizer = Tokenizer(engine.card)

        def run(traffic: Traffic) -> list[Record]:
            return engine.run(traffic, [tokenizer.encode(request.prompt) for request in traffic.requests])

        return _measure(run, served, options)


def through(served: Served, options: argparse.Namespace, rate: float) -> tuple[dict[str, Any], float]:
    settings = dict(served.settings)
    model, adapters = str(settings.pop("model")), str(settings.pop("adapters", ""))
    if "ENGINE_PYTHON" in os.environ:
        settings["engine_python"] = os.environ["ENGINE_PYTHON"]
    log = Path(tempfile.mkdtemp(prefix="multilora-bench-")) / "tritonserver.log"
    server = TritonServer(
        model=model, adapters=adapters, log=log, settings=settings, instances=options.instances, drain_s=1
    )
    with server:
        server_ready_s = server.wait_ready()
        clients = Clients(server.grpc, options.clients, options.timeout)
        before: dict[str, float] = {}

        def run(traffic: Traffic) -> list[Record]:
            nonlocal before
            before = cpu_seconds(server.processes())
            return clients.run(traffic)

        figures, rate = _measure(run, served, options, rate, lambda: cpu_seconds(server.processes(), before))
    return {"ready_s": server_ready_s, **figures}, rate


def _measure(
    run: Callable[[Traffic], list[Record]],
    served: Served,
    options: argparse.Namespace,
    rate: float = 0.0,
    used: Callable[[], dict[str, float]] = dict,
) -> tuple[dict[str, Any], float]:
    """Warm-up, closed, open at `rate` (0: chosen here). `used` gives the CPU seconds of the last run by process."""
    run(served.traffic(options, max(options.streams, len(served.adapters)), WARM_UP_TOKENS))
    closed = sorted(run(served.traffic(options, options.requests, options.output)), key=lambda r: r.submitted)
    seconds = max(r.last for r in closed) - min(r.submitted for r in closed)
    figures: dict[str, Any] = {
        "tokens_per_s": tokens_per_s(closed),
        "requests_per_s": len(closed) / seconds,
        "tokens_per_response": _tokens_per_response(closed),
        "closed_ttft": _ttft(closed),
        "cores_used": {name: spent / seconds for name, spent in used().items()},
    }
    if options.streams < len(closed):
        figures["begin_ttft"] = _ttft(closed[: options.streams])
        figures["follow_ttft"] = _ttft(closed[options.streams :])
    _require_all_tokens(closed, options.output)
    rate = rate or options.rate or OPEN_SHARE * figures["requests_per_s"]
    traffic = served.traffic(options, options.requests, options.output)
    times = poisson(rate, len(traffic.requests))
    requests = [replace(request, at=at) for request, at in zip(traffic.requests, times, strict=True)]
    opened = run(Traffic(requests, options.output, 0))
    _require_all_tokens(opened, options.output)
    figures["open_tokens_per_response"] = _tokens_per_response(opened)
    figures["open_ttft"] = _ttft(opened)
    figures["open_inter_token"] = report.spread([(r.last - r.first) / max(1, r.tokens - 1) for r in opened])
    return figures, rate


def _tokens_per_response(records: Sequence[Record]) -> float:
    return sum(record.tokens for record in records) / sum(record.responses for record in records)


def _ttft(records: Sequence[Record]) -> dict[str, float]:
    return report.spread([record.first - record.submitted for record in records])


def _require_all_tokens(records: Sequence[Record], output: int) -> None:
    short = [record.tokens for record in records if record.tokens != output]
    if short:
        raise RuntimeError(f"{len(short)} answers have not the {output} tokens asked for, the first {short[0]}")


def _served(options: argparse.Namespace) -> Served:
    if options.model:
        folder = options.adapters
        names = sorted(path.name for path in folder.iterdir()) if folder else []
        settings: dict[str, object] = {"model": str(options.model)}
        settings |= {"enable_prefix_caching": False, "max_num_seqs": options.streams}
        settings |= {"adapters": str(folder)} if folder else {}
        return Served(settings | report.settings(options), names, None)
    workdir = Workdir(options.workdir, options.shape, "cuda" if torch.cuda.is_available() else "cpu")
    names = [adapter_name(options.rank, i) for i in range(options.num_adapters)]
    catalogue = workdir.adapters(names) if names else None
    pool = device_bytes(workdir.shape, names)
    settings = settings_for(workdir.model(), catalogue, pool, max_num_seqs=options.streams)
    torch.cuda.empty_cache()  # what making the weights took
    return Served(settings | report.settings(options), names, Prompts(workdir.shape.vocab_size, options.input))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    problem = check_interpreters()
    if problem:
        print(problem, file=sys.stderr)
        return 1
    served = _served(options)
    engine, rate = alone(served, options)
    triton, _ = through(served, options, rate)
    what = options.model.name if options.model else f"{options.shape}, {options.input} in / {options.output} out"
    title = f"{what}, {report.device_name()}: {options.streams} streams, {len(served.adapters)} adapters"
    measured = {"open_rate": rate, "engine": engine, "triton": triton}
    result = {"options": vars(options), **measured}
    report.show(title, ["", "engine alone", "through Triton", ""], tables.through_triton_rows(result))
    report.console.print(tables.through_triton_note(result))
    report.write(options.json, "through_triton", arguments, options, **measured)
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    report.add_common_options(result, list(SHAPES))
    result.add_argument("--model", type=Path, help="a model folder instead of --shape")
    result.add_argument("--adapters", type=Path, help="its folder of adapters")
    result.add_argument("--prompt", default="benchmark", help="the prompt for --model")
    result.add_argument("--num-adapters", type=int, default=16)
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--streams", type=int, default=256)
    result.add_argument("--requests", type=int, default=512)
    result.add_argument("--rate", type=float, default=0.0, help="of open traffic, requests/s; 0: from the closed rate")
    result.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    result.add_argument("--output", type=int, default=32, help="tokens of an answer")
    result.add_argument("--instances", type=int, default=0, help="front ends; 0: as config.pbtxt says")
    cores = len(os.sched_getaffinity(0))
    result.add_argument("--clients", type=int, default=max(1, min(8, cores // 2)), help="client processes")
    result.add_argument("--timeout", type=float, default=300.0, help="of a request, seconds")
    return result


if __name__ == "__main__":
    sys.exit(main())
