# SPDX-License-Identifier: Apache-2.0
"""Latency of the engine without Triton: time to first token (TTFT) and time between tokens, by batch size.

A round submits a batch at once and waits until all of it has ended; TTFT is from submission to the token, so in a
batch it includes the wait for the others' prompts. Each batch size runs the base, one adapter, and as many adapters
as requests.

`--load-during` instead compares a saturated decode (`--max-num-seqs` requests over 16 adapters) with and without
adapters being loaded meanwhile, one every `--load-interval` seconds into room that the running ones leave: from disk,
or, with `--load-from host`, from the host cache. Only gaps that begin after the last first token count.

    python benchmarks/latency.py --shape llama-3.1-8b --input 256 --output 128
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import report
import torch
from shapes import SHAPES
from weights import Workdir, adapter_name, device_bytes, round_robin, settings_for
from workload import Driver, Run, running

WARM_UP_ROUNDS = 2
RUNNING_ADAPTERS = 16
SPARE_ADAPTERS = 4
"""Room in the pool for adapters that are loaded while others run."""
COLD_ADAPTERS = 16


class Loading:
    """Asks for one adapter after another, each the least recently loaded of those that are not resident."""

    def __init__(self, driver: Driver, names: Sequence[str], busy: Sequence[str], interval_s: float) -> None:
        self._manager = driver.engine.adapters
        self._names = list(names)
        self._busy = busy
        self._interval_s = interval_s
        self._due = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self._interval_s
        resident = self._manager.resident()
        cold = next((name for name in self._names if name not in resident), None)
        if cold is not None:
            self._manager.request(cold, protect=self._busy)
            self._names.remove(cold)
            self._names.append(cold)


def by_batch(driver: Driver, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch size and mix."""
    found = []
    for batch in options.batches:
        for mix in sorted({0, 1, batch}):
            names = [adapter_name(options.rank, i) for i in range(mix)] or [""]
            ttft: list[float] = []
            gaps: list[float] = []
            for index in range(WARM_UP_ROUNDS + options.rounds):
                driver.submit(round_robin(names, batch), options.input, options.output)
                done = driver.finish()
                if index >= WARM_UP_ROUNDS:
                    ttft += [timing.ttft for timing in done.timings]
                    gaps += [gap for timing in done.timings for gap in timing.gaps()]
            row = {"batch": batch, "adapters": mix, "ttft": report.spread(ttft), "inter_token": report.spread(gaps)}
            found.append(row)
    return found


def during_loads(driver: Driver, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows, without and with loads, over the same requests `--repeats` times by turns."""
    busy, cold = _names_during(options)
    if options.load_from == "host":
        for name in cold:  # one at a time, since they do not fit together
            driver.load([name])
    driver.load(busy)

    def saturated(loading: bool) -> Run:
        driver.submit(round_robin(busy, options.max_num_seqs), options.input, options.output)
        return driver.finish(Loading(driver, cold, busy, options.load_interval) if loading else lambda: None)

    saturated(loading=True)
    gaps: dict[bool, list[float]] = {False: [], True: []}
    load_seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.repeats):
        for loading in (False, True):
            driver.settle()
            done = saturated(loading)
            load_seconds[loading] += done.load_seconds
            since = max(timing.tokens[0] for timing in done.timings)
            gaps[loading] += [gap for timing in done.timings for gap in timing.gaps(since)]
    found: list[dict[str, Any]] = []
    for loading in (False, True):
        load = report.spread(load_seconds[loading]) if load_seconds[loading] else {"count": 0}
        found.append({"loading": loading, "load": load, "inter_token": report.spread(gaps[loading])})
    return found


def _names_during(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    busy = [adapter_name(options.rank, i) for i in range(RUNNING_ADAPTERS)]
    return busy, [adapter_name(options.rank, RUNNING_ADAPTERS + i) for i in range(COLD_ADAPTERS)]


def _settings(options: argparse.Namespace) -> dict[str, object]:
    workdir = Workdir(options.workdir, options.shape, "cuda" if torch.cuda.is_available() else "cpu")
    more: dict[str, object] = {}
    if options.load_during:
        busy, cold = _names_during(options)
        names, held = busy + cold, busy + cold[:SPARE_ADAPTERS]
        more = {"max_num_seqs": options.max_num_seqs}
        if options.load_from == "disk":
            more["adapter_host_bytes"] = 0
    else:
        names = held = [adapter_name(options.rank, i) for i in range(max(options.batches))]
        more = {"max_num_seqs": max(options.batches)}
    pool = device_bytes(workdir.shape, held)
    if options.load_during and options.load_from == "host":
        more["adapter_host_bytes"] = 2 * device_bytes(workdir.shape, names)
    settings = settings_for(workdir.model(), workdir.adapters(names), pool, **more) | report.settings(options)
    if workdir.device == "cuda":
        torch.cuda.empty_cache()  # what making the weights took
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    with running(**_settings(options)) as (driver, ready_s):
        rows = during_loads(driver, options) if options.load_during else by_batch(driver, options)
    title = f"{options.shape}, {report.device_name()}: {options.input} in / {options.output} out, rank {options.rank}"
    if options.load_during:
        _show_loads(title, rows, options)
        report.write(options.json, "latency_during_loads", arguments, options, rows=rows)
    else:
        _show_batches(title, rows)
        report.write(options.json, "latency", arguments, options, rows=rows, ready_s=ready_s)
    return 0


def _show_batches(title: str, rows: list[dict[str, Any]]) -> None:
    base = {row["batch"]: row["inter_token"]["p50_ms"] for row in rows if not row["adapters"]}
    lines = []
    for row in rows:
        ttft, gap = row["ttft"], row["inter_token"]
        times = [f"{value:.2f}" for value in (ttft["p50_ms"], ttft["p99_ms"], gap["p50_ms"], gap["p99_ms"])]
        share = gap["p50_ms"] / base[row["batch"]]
        lines.append([str(row["batch"]), str(row["adapters"] or "base"), *times, f"{share:.3f}"])
    report.show(
        title,
        ["batch", "adapters", "TTFT p50 ms", "p99 ms", "inter-token p50 ms", "p99 ms", "p50 / base"],
        lines,
    )


def _show_loads(title: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    lines = []
    for row in rows:
        gap = row["inter_token"]
        change = gap["p99_ms"] / rows[0]["inter_token"]["p99_ms"] - 1
        kind = f"loads from {options.load_from}" if row["loading"] else "nothing loaded"
        times = [f"{gap[name]:.2f}" for name in ("p50_ms", "p90_ms", "p99_ms")]
        took = f"{row['load']['p50_ms']:.1f}" if row["load"]["count"] else ""
        lines.append([kind, str(row["load"]["count"]), took, *times, f"{100 * change:+.1f}%"])
    columns = ["decode", "loads", "load p50 ms", "inter-token p50 ms", "p90 ms", "p99 ms", "p99 change"]
    report.show(f"{title}, {options.max_num_seqs} running", columns, lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    report.add_common_options(result, list(SHAPES))
    result.add_argument("--batches", type=report.integers, default=[1, 8, 32])
    result.add_argument("--rounds", type=int, default=20, help="batches that are measured of each kind")
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    result.add_argument("--output", type=int, default=32, help="tokens of an answer")
    result.add_argument("--load-during", action="store_true")
    result.add_argument("--load-from", choices=("disk", "host"), default="disk")
    result.add_argument("--load-interval", type=float, default=0.1, help="seconds between loads")
    result.add_argument("--max-num-seqs", type=int, default=128, help="running requests of --load-during")
    result.add_argument("--repeats", type=int, default=2, help="of --load-during")
    return result


if __name__ == "__main__":
    sys.exit(main())
