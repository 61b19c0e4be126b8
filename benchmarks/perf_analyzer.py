# SPDX-License-Identifier: Apache-2.0
"""Triton's own perf_analyzer against a server of ours, gRPC streaming, another adapter in every request: `make perf`.

perf_analyzer sends the requests of an input file in turn; the file names the base and every adapter once. It announces
that it measures a streaming model by the first response; its figures are those of whole answers all the same, so the
time to the first response is taken from its profile.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from multilora_backend.errors import MultiloraError, invalid
from multilora_backend.launcher import REPOSITORY, TritonServer

ROOT = Path(__file__).resolve().parents[1]
BASE = "(base)"
WINDOWS = 3
"""perf_analyzer judges stability by its last three windows; with fewer it calls every run unstable."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    console = Console()
    setup = subprocess.run([ROOT / "scripts" / "setup_perf.sh"], stdout=subprocess.PIPE, text=True)
    if setup.returncode:
        return setup.returncode
    tool = setup.stdout.strip()
    adapters = options.names.split(",") if options.names else sorted(path.name for path in options.adapters.iterdir())
    with tempfile.TemporaryDirectory(prefix="multilora-perf-") as folder:
        work = Path(folder)
        data = requests(adapters, options)
        (work / "input.json").write_text(json.dumps({"data": data}))
        server = TritonServer(
            model=options.model,
            adapters=options.adapters,
            repository=options.repository,
            log=work / "server.log",
            instances=options.instances,
            drain_s=1,
        )
        with server:
            try:
                console.print(f"server ready after {server.wait_ready():.1f} s")
                warm_up(server.http, data)
            except MultiloraError as error:
                console.print(error.message, markup=False)
                return 1
            for concurrency in options.concurrency:
                if not run(tool, server.grpc, concurrency, work, options.seconds):
                    if server.poll() is not None:
                        console.print(server.log_tail(), markup=False)
                    return 1
        console.print(summary(work, options.concurrency))
        silent = [by_adapter(work, concurrency, [BASE, *adapters], console) for concurrency in options.concurrency]
    return 1 if any(silent) else 0


def requests(adapters: list[str], options: argparse.Namespace) -> list[dict]:
    """perf_analyzer's input format: a tensor's values by its name. The optional `lora_name` is absent for the base."""
    # Strings for numbers, as genai-perf sends them.
    sampling = {"max_tokens": str(options.tokens), "min_tokens": str(options.tokens), "temperature": "0"}
    common = {
        "text_input": [options.prompt],
        "stream": [True],
        "exclude_input_in_output": [True],
        "sampling_parameters": [json.dumps(sampling)],
    }
    return [common, *({**common, "lora_name": [name]} for name in adapters)]


def warm_up(address: str, data: list[dict]) -> None:
    """Sends every request once: the first of an adapter loads it, and a wrong one is better refused here."""
    for request in data:
        body = {name: values[0] for name, values in request.items() if name != "stream"}
        post = urllib.request.Request(f"http://{address}/v2/models/multilora/generate", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(post, timeout=60) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            raise invalid(request.get("lora_name", [BASE])[0], json.load(error)["error"]) from error


def run(tool: str, address: str, concurrency: int, work: Path, seconds: float) -> bool:
    """One run of perf_analyzer, which prints its report and leaves a CSV and a profile; False if a request failed."""
    command: list[object] = [tool, "-m", "multilora", "-i", "grpc", "-u", address, "--streaming", "--async"]
    command += ["--input-data", work / "input.json", "--concurrency-range", concurrency]
    # Windows of a fixed length, and no more of them if they differ: this shows the path, a benchmark takes longer.
    command += ["--measurement-interval", int(1000 * seconds), "--max-trials", WINDOWS, "--stability-percentage", 999]
    command += ["-f", work / f"{concurrency}.csv", "--profile-export-file", work / f"{concurrency}.json"]
    return subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, cwd=work).returncode == 0


def summary(work: Path, concurrencies: list[int]) -> Table:
    table = Table(
        "concurrency", "requests/s", "responses/s", "p50 ms", "p90 ms", "p99 ms", title="perf_analyzer: whole answers"
    )
    for concurrency in concurrencies:
        with open(work / f"{concurrency}.csv", newline="") as file:
            for row in csv.DictReader(file):
                rates = (f"{float(row[name]):.1f}" for name in ("Inferences/Second", "Response Throughput"))
                times = (f"{float(row[f'{name} latency']) / 1000:.1f}" for name in ("p50", "p90", "p99"))
                table.add_row(row["Concurrency"], *rates, *times)
    return table


def by_adapter(work: Path, concurrency: int, names: list[str], console: Console) -> list[str]:
    """Prints one run's requests adapter by adapter; returns those with requests that got no text."""
    seen: dict[str, list[dict]] = {name: [] for name in names}
    for experiment in json.loads((work / f"{concurrency}.json").read_text())["experiments"]:
        for request in experiment["requests"]:
            seen[request["request_inputs"].get("lora_name", BASE)].append(request)
    table = Table(
        "adapter", "requests", "first response ms", "whole answer ms", title=f"concurrency {concurrency}, medians"
    )
    silent = []
    for name, entries in seen.items():
        whole = [entry for entry in entries if any(output.get("text_output") for output in entry["response_outputs"])]
        if not whole or len(whole) < len(entries):
            silent.append(name)
            table.add_row(name, f"[red]{len(entries) - len(whole)} of {len(entries)} without text[/red]", "", "")
            continue
        spans = [[(entry["response_timestamps"][i] - entry["timestamp"]) / 1e6 for entry in whole] for i in (0, -1)]
        table.add_row(name, str(len(whole)), *(f"{statistics.median(span):.1f}" for span in spans))
    console.print(table)
    return silent


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--model", type=Path, default=ROOT / "examples/tiny/model")
    result.add_argument("--adapters", type=Path, default=ROOT / "examples/tiny/adapters", help="folder of adapters")
    result.add_argument("--names", default="", help="adapters to ask for, comma-separated (default: every folder)")
    result.add_argument("--repository", type=Path, default=REPOSITORY)
    result.add_argument("--instances", type=int, default=0, help="front ends; 0: as config.pbtxt says")
    result.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16])
    result.add_argument("--seconds", type=float, default=2.0, help=f"of a window; a run has {WINDOWS}")
    result.add_argument("--prompt", default="benchmark")
    result.add_argument("--tokens", type=int, default=16, help="tokens of an answer")
    return result


if __name__ == "__main__":
    sys.exit(main())
