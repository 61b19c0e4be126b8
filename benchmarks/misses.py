# SPDX-License-Identifier: Apache-2.0
"""What a miss adds to the time to first token on an idle engine: one request at a time, without Triton.

By turns a request for the base, one for an adapter that is on the device (a hit), and one for an adapter that is not
(a miss): it lies in the host cache or, with `--load-from disk`, must be read. The pool has room for few adapters, so
that the one asked for next has always been evicted.

    python benchmarks/misses.py --shape llama-3.1-8b --input 256
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import report
import torch
from shapes import SHAPES
from weights import Workdir, adapter_name, device_bytes, settings_for
from workload import Driver, running

BASE, HIT, MISS = "base", "hit", "miss"
RESIDENT, COLD = 2, 6
"""Adapters that the pool has room for, and those that take turns to be missed."""
WARM_UP_ROUNDS = 2 * COLD


def measure(driver: Driver, hot: str, cold: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of request. Raises RuntimeError if one was of another kind than it should have been."""
    ttft: dict[str, list[float]] = {BASE: [], HIT: [], MISS: []}
    resident = driver.engine.adapters.resident
    missing = itertools.cycle(cold)
    for index in range(WARM_UP_ROUNDS + options.rounds):
        for kind, name in ((BASE, ""), (HIT, hot), (MISS, next(missing))):
            if kind == HIT:
                driver.load([hot])
            driver.settle()
            if kind != BASE and (name in resident()) != (kind == HIT):
                raise RuntimeError(f"{name} was to be a {kind}")
            driver.submit([name], options.input, options.output)
            done = driver.finish()
            if index >= WARM_UP_ROUNDS:
                ttft[kind] += [timing.ttft for timing in done.timings]
    return [{"kind": kind, "ttft": report.spread(seconds)} for kind, seconds in ttft.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    names = [adapter_name(options.rank, i) for i in range(1 + COLD)]
    workdir = Workdir(options.workdir, options.shape, "cuda" if torch.cuda.is_available() else "cpu")
    host = 2 * device_bytes(workdir.shape, names) if options.load_from == "host" else 0
    pool = device_bytes(workdir.shape, names[:RESIDENT])
    settings = settings_for(workdir.model(), workdir.adapters(names), pool, adapter_host_bytes=host, max_num_seqs=8)
    if workdir.device == "cuda":
        torch.cuda.empty_cache()  # what making the weights took
    with running(**settings | report.settings(options)) as (driver, _):
        rows = measure(driver, names[0], names[1:], options)
    lines = []
    for row in rows:
        ttft = row["ttft"]
        more = ttft["p50_ms"] - rows[1]["ttft"]["p50_ms"]
        times = [f"{ttft[name]:.2f}" for name in ("p50_ms", "p90_ms", "p99_ms")]
        lines.append([row["kind"], str(ttft["count"]), *times, f"{more:+.2f}" if row["kind"] == MISS else ""])
    title = f"{options.shape}, {report.device_name()}: {options.input} in, misses from {options.load_from}"
    report.show(title, ["request", "count", "TTFT p50 ms", "p90 ms", "p99 ms", "p50 - hit"], lines)
    report.write(options.json, "misses", arguments, options, rows=rows)
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    report.add_common_options(result, list(SHAPES))
    result.add_argument("--rounds", type=int, default=30)
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    result.add_argument("--output", type=int, default=4, help="tokens of an answer")
    result.add_argument("--load-from", choices=("host", "disk"), default="host")
    return result


if __name__ == "__main__":
    sys.exit(main())
