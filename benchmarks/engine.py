# SPDX-License-Identifier: Apache-2.0
"""Offline throughput of the engine at a real model's shapes, with random weights and adapters: no download, no Triton.

All requests are there from the start (closed, offline): random prompts of `--input` tokens, `--output` tokens each,
adapters round robin. The rate is output tokens over the time from the first step to the last token, prefill included;
loading adapters is not. Mixes: `off` (an engine with LoRA off: the base that shares refer to), `0` (LoRA on, the
adapters of all other mixes resident, base traffic), a number of adapters of `--rank`, `mixed` (16 adapters of ranks
8, 16, 32 and 64) and `mean` (16 of their mean rank).

    python benchmarks/engine.py --shape llama-3.1-8b --requests 512 --input 256 --output 256
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import report
import torch
import vllm_figures
from shapes import SHAPES
from weights import Workdir, adapter_name, device_bytes, round_robin, settings_for

if TYPE_CHECKING:
    from workload import Driver

OFF = "off"
MIXED_RANKS = (8, 16, 32, 64)
MIXED_ADAPTERS = 16
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Measured:
    """One timed run of a mix."""

    tokens_per_s: float
    seconds: float
    loads: int
    preemptions: int


@dataclass
class Figures:
    """One engine: from its construction to ready, and from its process's start, and its mixes' runs."""

    ready_s: float = 0.0
    process_ready_s: float = 0.0
    runs: dict[str, list[Measured]] = field(default_factory=dict)


def adapters_of(mix: str, rank: int) -> list[str]:
    """Names of a mix's adapters, in the order of its requests."""
    if mix in (OFF, "0"):
        return []
    if mix == "mixed":
        return [adapter_name(r, i) for i in range(MIXED_ADAPTERS // len(MIXED_RANKS)) for r in MIXED_RANKS]
    if mix == "mean":
        mean = sum(MIXED_RANKS) // len(MIXED_RANKS)
        return [adapter_name(mean, i) for i in range(MIXED_ADAPTERS)]
    return [adapter_name(rank, i) for i in range(int(mix))]


def measure(mixes: Sequence[str], settings: dict[str, object], options: argparse.Namespace, began: float) -> Figures:
    """One engine through all of its mixes, `--repeats` times by turns, so that a drift of the clock meets all alike."""
    from workload import running  # here: the process that only makes the weights does without the engine's imports

    figures = Figures()
    resident = sorted({name for mix in mixes for name in adapters_of(mix, options.rank)})
    with running(**settings) as (driver, figures.ready_s):
        figures.process_ready_s = time.time() - began
        if not options.resident:
            driver.load(resident)
        for mix in mixes:
            run(driver, mix, options, min(options.requests, options.max_num_seqs), WARM_UP_TOKENS)
        for _ in range(options.repeats):
            for mix in mixes:
                measured = run(driver, mix, options, options.requests, options.output)
                figures.runs.setdefault(mix, []).append(measured)
                print(f"  {mix}: {measured.tokens_per_s:.0f} output tokens/s", file=sys.stderr, flush=True)
    return figures


def run(driver: Driver, mix: str, options: argparse.Namespace, requests: int, outputs: int) -> Measured:
    names = adapters_of(mix, options.rank) or [""]
    before = driver.engine.scheduler.preemptions
    driver.submit(round_robin(names, max(requests, len(names))), options.input, outputs, options.temperature)
    done = driver.finish()
    return Measured(done.rate, done.seconds, len(done.load_seconds), driver.engine.scheduler.preemptions - before)


def measure_all(options: argparse.Namespace) -> dict[str, Figures]:
    """The engine with LoRA off and the one with LoRA on; on CUDA each in a process of its own, which leaves nothing."""
    workdir = Workdir(options.workdir, options.shape, "cuda" if torch.cuda.is_available() else "cpu")
    common: dict[str, object] = {"max_num_seqs": options.max_num_seqs}
    if options.max_num_batched_tokens:
        common["max_num_batched_tokens"] = options.max_num_batched_tokens
    found: dict[str, Figures] = {}
    for kind, mixes in {
        "off": [mix for mix in options.mixes if mix == OFF],
        "on": [mix for mix in options.mixes if mix != OFF],
    }.items():
        if not mixes:
            continue
        catalogue, pool = None, 0
        if kind == "on":
            names = sorted({name for mix in mixes for name in adapters_of(mix, options.rank)})
            names = names or [adapter_name(options.rank, 0)]
            catalogue = workdir.adapters(names)
            held = names[: options.resident] if options.resident else names
            pool = device_bytes(workdir.shape, held)
            common |= {"max_loras": options.max_loras}
        settings = settings_for(workdir.model(), catalogue, pool, **common) | report.settings(options)
        if workdir.device == "cpu":
            found[kind] = measure(mixes, settings, options, time.time())
            continue
        torch.cuda.empty_cache()  # what making the weights took
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found[kind] = process.submit(measure, mixes, settings, options, time.time()).result()
    return found


def rows(runs: dict[str, list[Measured]], options: argparse.Namespace) -> list[list[str]]:
    best = {mix: max(run.tokens_per_s for run in measured) for mix, measured in runs.items()}
    base = best.get(OFF) or best.get("0")
    lines = []
    for mix, rate in best.items():
        vllm = vllm_figures.rate(vars(options), mix)
        lines.append(
            [
                mix,
                f"{rate:,.0f}",
                f"{100 * rate / base:.1f}%" if base else "",
                f"{vllm:,.0f}" if vllm else "",
                f"{100 * vllm / vllm_figures.BASE:.0f}%" if vllm else "",
                f"{100 * min(r.tokens_per_s for r in runs[mix]) / rate - 100:.1f}%",
                str(max(r.loads for r in runs[mix])),
            ]
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    figures = measure_all(options)
    runs = {mix: measured for one in figures.values() for mix, measured in one.runs.items()}
    title = (
        f"{options.shape}, {report.device_name()}: {options.requests} requests, {options.input} in / "
        f"{options.output} out, rank {options.rank}, at most {options.max_num_seqs} running"
    )
    columns = ["adapters", "output tok/s", "of own base", "vLLM 0.26, H200", "of its base", "worst run", "loads"]
    report.show(title, columns, rows(runs, options))
    for kind, one in figures.items():
        report.console.print(f"LoRA {kind}: ready after {one.ready_s:.1f} s ({one.process_ready_s:.1f} s with imports)")
    report.write(
        options.json,
        "engine",
        arguments,
        options,
        start={kind: {"ready_s": f.ready_s, "process_ready_s": f.process_ready_s} for kind, f in figures.items()},
        best={mix: max(run.tokens_per_s for run in measured) for mix, measured in runs.items()},
        runs={mix: [asdict(run) for run in measured] for mix, measured in runs.items()},
    )
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    report.add_common_options(result, list(SHAPES))
    result.add_argument("--mixes", type=_mixes, default=_mixes("off,0,1,4,16,64,mixed,mean"))
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--requests", type=int, default=64)
    result.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    result.add_argument("--output", type=int, default=32, help="tokens of an answer")
    result.add_argument("--max-num-seqs", type=int, default=256)
    result.add_argument("--max-num-batched-tokens", type=int, default=0, help="0: the engine's default")
    result.add_argument("--max-loras", type=int, default=0, help="adapters in one step; 0: no bound")
    result.add_argument("--resident", type=int, default=0, help="adapters that the device pool holds; 0: all")
    result.add_argument("--repeats", type=int, default=2)
    result.add_argument("--temperature", type=float, default=0.0)
    return result


def _mixes(text: str) -> list[str]:
    mixes = text.split(",")
    for mix in mixes:
        if mix not in (OFF, "mixed", "mean") and not mix.isdecimal():
            raise argparse.ArgumentTypeError(f"{mix!r} is none of off, mixed, mean and a number of adapters")
    return mixes


if __name__ == "__main__":
    sys.exit(main())
