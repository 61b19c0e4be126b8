# SPDX-License-Identifier: Apache-2.0
"""Several adapters and the base model streaming side by side with asyncio, half over gRPC and half over HTTP.

python examples/client_async.py [WORD] [ADAPTER ...]
"""

from __future__ import annotations

import asyncio
import sys

from multilora_client import AsyncClient, MultiloraClientError


async def show(client: AsyncClient, word: str, adapter: str | None) -> None:
    stream = client.stream(word, adapter, max_tokens=32, temperature=0)
    label = f"{client.settings.protocol} {adapter or 'base':12}"
    try:
        async for chunk in stream:
            print(f"{label}{chunk.text!r}")
    except MultiloraClientError as error:
        print(f"{label}{type(error).__name__}: {error}")
    else:
        done = await stream.completion()
        print(f"{label}done: {done.text.strip()!r}, first token after {1000 * (done.ttft_s or 0):.0f} ms")


async def main(word: str = "triton", *names: str) -> None:
    adapters = [None, *(names or ("upper", "reverse", "rot13"))]
    async with AsyncClient("localhost:8001") as grpc, AsyncClient("localhost:8000", protocol="http") as http:
        await asyncio.gather(*(show((grpc, http)[i % 2], word, name) for i, name in enumerate(adapters)))


asyncio.run(main(*sys.argv[1:]))
