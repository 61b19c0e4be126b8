# SPDX-License-Identifier: Apache-2.0
"""One Triton model, six adapters and the base, streamed side by side over gRPC and HTTP: `make demo`.

Starts a real tritonserver on free ports with the example model, sends the same words through every adapter at once,
compares each answer with the function that the adapter was trained on, and stops everything. The exit status is 1 if an
answer was wrong or if the adapters did not all run in one step.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from multilora_backend.errors import MultiloraError
from multilora_backend.launcher import TritonServer
from multilora_client import AsyncClient, MultiloraClientError
from tiny.tasks import ADAPTERS, BASE, TASKS, held_out_words

HERE = Path(__file__).resolve().parent
WORDS = held_out_words(16, seed=2026)


@dataclass
class Lane:
    """One row of the table: the words that one adapter answers over one protocol, one after the other."""

    adapter: str
    protocol: str
    word: str = ""
    text: str = ""
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    total_s: float = 0.0

    async def run(self, client: AsyncClient) -> None:
        for self.word in WORDS:
            self.text = ""
            started = time.monotonic()
            adapter = None if self.adapter == BASE else self.adapter
            async for chunk in client.stream(self.word, adapter=adapter, temperature=0.0, max_tokens=32):
                if not self.text:
                    self.ttft_s.append(time.monotonic() - started)
                self.text += chunk.text
                self.tokens += chunk.num_output_tokens
            self.total_s += time.monotonic() - started
            expected = TASKS[self.adapter](self.word)
            if self.text == expected:
                self.right += 1
            else:
                self.wrong.append(f"{self.word}: {self.text!r} instead of {expected!r}")


def table(lanes: list[Lane]) -> Table:
    columns = ("adapter", "over", "prompt", "answer", "right", "TTFT ms", "tokens/s")
    out = Table(
        *columns, title="one Triton model, every adapter in the same batch", box=box.SIMPLE, collapse_padding=True
    )
    for lane in lanes:
        done = lane.right + len(lane.wrong)
        score = f"{lane.right}/{done}" if not lane.wrong else f"[red]{lane.right}/{done}[/red]"
        ttft = f"{1000 * statistics.median(lane.ttft_s):.0f}" if lane.ttft_s else ""
        rate = f"{lane.tokens / lane.total_s:.0f}" if lane.total_s else ""
        out.add_row(lane.adapter, lane.protocol, lane.word, f"[bold]{lane.text:<24}[/bold]", score, ttft, rate)
    return out


async def stream_all(server: TritonServer, lanes: list[Lane], console: Console) -> None:
    """All lanes at once, over one gRPC and one HTTP client, redrawn ten times a second."""
    async with AsyncClient(server.grpc, protocol="grpc") as grpc, AsyncClient(server.http, protocol="http") as http:
        tasks = [asyncio.create_task(lane.run(grpc if lane.protocol == "gRPC" else http)) for lane in lanes]
        try:
            with Live(table(lanes), console=console, refresh_per_second=10, transient=True) as live:
                while not all(task.done() for task in tasks):
                    await asyncio.sleep(0.1)
                    live.update(table(lanes))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


def metric(server: TritonServer, name: str) -> float:
    """A gauge from Triton's own metrics endpoint, once the front end has reported after the last request."""
    time.sleep(1.0)
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as response:
        found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", response.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def main() -> int:
    console = Console()
    lanes = [Lane(adapter, protocol) for adapter in (BASE, *ADAPTERS) for protocol in ("gRPC", "HTTP")]
    log = Path(tempfile.mkdtemp(prefix="multilora-demo-")) / "tritonserver.log"
    started = time.monotonic()
    try:
        with TritonServer(model=HERE / "tiny/model", adapters=HERE / "tiny/adapters", log=log, drain_s=1) as server:
            with console.status("starting tritonserver"):
                server.wait_ready(timeout=120)
            console.print(f"tritonserver is ready after {time.monotonic() - started:.1f} s (log: {log})")
            asyncio.run(stream_all(server, lanes, console))
            together = int(metric(server, "multilora:adapters_per_step_max"))
    except KeyboardInterrupt:
        console.print("interrupted; the server is stopped")
        return 130
    except (MultiloraError, MultiloraClientError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    console.print(table(lanes))
    wrong = [f"{lane.adapter} over {lane.protocol}: {problem}" for lane in lanes for problem in lane.wrong]
    for problem in wrong:
        console.print(f"[red]wrong[/red] {problem}", highlight=False)
    console.print(f"largest number of different adapters in one step: {together} of {len(ADAPTERS)}")
    console.print(f"{sum(lane.right for lane in lanes)} answers right, {len(wrong)} wrong")
    return int(bool(wrong) or together != len(ADAPTERS))


if __name__ == "__main__":
    sys.exit(main())
