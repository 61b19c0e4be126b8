# SPDX-License-Identifier: Apache-2.0
"""One client process of through_triton.py: streams its share of the requests over one gRPC connection.

Reads the traffic as JSON from its first line of input, answers `ready`, starts on the next line, and writes its records
as one line of JSON. Several of these run beside each other, so that no client is what limits the server.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import asdict

from traffic import Record, Request, Traffic

from multilora_client import AsyncClient


async def stream(client: AsyncClient, request: Request, output: int) -> Record:
    record = Record(time.monotonic())
    options = {"max_tokens": output, "temperature": 0.0, "ignore_eos": True}
    async for chunk in client.stream(request.prompt, request.adapter or None, **options):
        record.take(time.monotonic(), chunk.num_output_tokens)
    return record


async def closed(client: AsyncClient, traffic: Traffic) -> list[Record]:
    """`concurrency` workers, each with one request at a time."""
    left = iter(traffic.requests)

    async def worker() -> list[Record]:
        return [await stream(client, request, traffic.output) for request in left]

    found = await asyncio.gather(*(worker() for _ in range(traffic.concurrency)))
    return [record for records in found for record in records]


async def opened(client: AsyncClient, traffic: Traffic) -> list[Record]:
    """Each request at its own time, however many are in flight."""
    started = time.monotonic()

    async def later(request: Request) -> Record:
        await asyncio.sleep(max(0.0, started + request.at - time.monotonic()))
        return await stream(client, request, traffic.output)

    return list(await asyncio.gather(*map(later, traffic.requests)))


async def main() -> None:
    work = json.loads(sys.stdin.readline())
    traffic = Traffic([Request(**request) for request in work["requests"]], work["output"], work["concurrency"])
    async with AsyncClient(work["url"], protocol="grpc", timeout=work["timeout_s"], retries=0) as client:
        if not await client.ready(wait_s=30.0):
            sys.exit(f"{work['url']}: the model is not ready")
        print("ready", flush=True)
        sys.stdin.readline()
        gc.disable()
        records = await (closed if traffic.concurrency else opened)(client, traffic)
    print(json.dumps([asdict(record) for record in records]), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
