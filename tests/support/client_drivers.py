# SPDX-License-Identifier: Apache-2.0
"""The two clients behind one interface, so that a test says once what both must do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from multilora_client import AsyncClient, Chunk, Client, Completion


class SyncDriver:
    """The sync client, as the tests that both clients must pass use it."""

    def __init__(self, url: str, protocol: str, **arguments: Any) -> None:
        self.client = Client(url, protocol=protocol, **arguments)  # type: ignore[arg-type]

    def generate(self, *arguments: Any, **keywords: Any) -> Completion:
        return self.client.generate(*arguments, **keywords)

    def chat(self, *arguments: Any, **keywords: Any) -> Completion:
        return self.client.chat(*arguments, **keywords)

    def ready(self, wait_s: float = 0.0) -> bool:
        return self.client.ready(wait_s)

    def stream(self, *arguments: Any, **keywords: Any) -> tuple[list[Chunk], Completion]:
        stream = self.client.stream(*arguments, **keywords)
        return list(stream), stream.completion()

    def break_after(self, count: int, *arguments: Any, **keywords: Any) -> None:
        for seen, _ in enumerate(self.client.stream(*arguments, **keywords), 1):
            if seen == count:
                break

    def many(self, calls: list[tuple[Any, ...]]) -> list[Completion]:
        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(lambda call: self.client.generate(*call), calls))

    def close_elsewhere(self, wait_s: float, *arguments: Any) -> None:
        """Waits in a stream while another thread closes it."""
        stream = self.client.stream(*arguments)
        timer = threading.Timer(wait_s, stream.close)
        timer.start()
        try:
            stream.completion()
        finally:
            timer.join()

    def close(self) -> None:
        self.client.close()


class AsyncDriver:
    """The asyncio client behind the methods of SyncDriver, in an event loop that runs in its own thread."""

    def __init__(self, url: str, protocol: str, **arguments: Any) -> None:
        self.client = AsyncClient(url, protocol=protocol, **arguments)  # type: ignore[arg-type]
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def generate(self, *arguments: Any, **keywords: Any) -> Completion:
        return self.run(self.client.generate(*arguments, **keywords))

    def chat(self, *arguments: Any, **keywords: Any) -> Completion:
        return self.run(self.client.chat(*arguments, **keywords))

    def ready(self, wait_s: float = 0.0) -> bool:
        return self.run(self.client.ready(wait_s))

    def stream(self, *arguments: Any, **keywords: Any) -> tuple[list[Chunk], Completion]:
        async def run() -> tuple[list[Chunk], Completion]:
            stream = self.client.stream(*arguments, **keywords)
            return [chunk async for chunk in stream], await stream.completion()

        return self.run(run())

    def break_after(self, count: int, *arguments: Any, **keywords: Any) -> None:
        async def run() -> None:
            seen = 0
            async for _ in self.client.stream(*arguments, **keywords):
                seen += 1
                if seen == count:
                    break

        self.run(run())

    def many(self, calls: list[tuple[Any, ...]]) -> list[Completion]:
        async def run() -> list[Completion]:
            return await asyncio.gather(*(self.client.generate(*call) for call in calls))

        return self.run(run())

    def close_elsewhere(self, wait_s: float, *arguments: Any) -> None:
        """Waits in a stream while another task closes it."""

        async def run() -> None:
            stream = self.client.stream(*arguments)
            asyncio.get_running_loop().call_later(wait_s, stream.close)
            await stream.completion()

        self.run(run())

    def close(self) -> None:
        self.run(self.client.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


Connect = Callable[..., Any]
