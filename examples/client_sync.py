# SPDX-License-Identifier: Apache-2.0
"""One prompt through several adapters and the base model at once, from threads: one client serves them all.

python examples/client_sync.py [WORD] [ADAPTER ...]
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from multilora_client import Client, MultiloraClientError

word, *names = sys.argv[1:] or ["triton"]
adapters: list[str | None] = [None, *(names or ["upper", "reverse", "rot13"])]

with Client("localhost:8001", timeout=30) as client, ThreadPoolExecutor(len(adapters)) as pool:

    def ask(adapter: str | None) -> str:
        try:
            completion = client.generate(word, adapter, max_tokens=32, temperature=0)
        except MultiloraClientError as error:
            return f"{type(error).__name__}: {error}"
        return f"{completion.text.strip()}  ({completion.num_output_tokens} tokens, {completion.total_s:.2f} s)"

    for adapter, answer in zip(adapters, pool.map(ask, adapters), strict=True):
        print(f"{adapter or 'base':12}{answer}")

    print("streamed    ", end="")
    for chunk in client.stream(word, adapters[-1], max_tokens=32, temperature=0):
        print(chunk.text, end="|", flush=True)
    print()
