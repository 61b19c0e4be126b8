# SPDX-License-Identifier: Apache-2.0
"""What the client needs to be installed: tritonclient and numpy, and of these only the protocol that is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVER_ONLY = ["torch", "transformers", "tokenizers", "safetensors", "msgspec", "zmq", "jinja2", "yaml", "rich"]
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
"""


def run(code: str, blocked: list[str]) -> None:
    source = BLOCK.format(blocked=set(blocked)) + code
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_works_without_the_servers_libraries(fake, protocol):
    run(
        f"""
import asyncio
from multilora_client import AsyncClient, Client
with Client({fake.urls[protocol]!r}, protocol={protocol!r}) as client:
    assert client.generate("hello").text == "ok"
async def ask():
    async with AsyncClient({fake.urls[protocol]!r}, protocol={protocol!r}) as client:
        assert (await client.generate("hello")).text == "ok"
asyncio.run(ask())
import multilora_client.cli
""",
        [*SERVER_ONLY, "multilora_backend", "multilora_kernels"],
    )


@pytest.mark.parametrize(
    ("protocol", "blocked"),
    [("grpc", ["aiohttp", "gevent", "geventhttpclient"]), ("http", ["grpc", "gevent", "geventhttpclient"])],
)
def test_one_protocol_does_not_need_the_others_library(fake, protocol, blocked):
    run(
        f"""
import multilora_client.cli
with multilora_client.Client({fake.urls[protocol]!r}, protocol={protocol!r}) as client:
    assert client.generate("hello").text == "ok"
""",
        blocked,
    )
