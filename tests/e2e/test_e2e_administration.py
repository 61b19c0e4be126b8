# SPDX-License-Identifier: Apache-2.0
"""What the real tritonserver passes on, to an engine that only repeats: commands in every protocol, and headers."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from frontend_fakes import FakeEngines, wait_until
from multilora_backend.launcher import TritonServer
from multilora_backend.protocol import ModelCard
from multilora_client import Client

MODEL = Path(__file__).resolve().parents[2] / "examples/tiny/model"
CARD = ModelCard(
    model="tiny",
    max_model_len=64,
    vocab_size=400,
    eos_token_ids=[1],
    tokenizer_json=(MODEL / "tokenizer.json").read_bytes(),
    chat_template=None,
    special_tokens={},
    lora_enabled=True,
)
SHOW = {"action": "show", "name": "é"}
SHOWN = {"action": "show", "name": "é", "token": ""}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> FakeEngines:
    return FakeEngines(tmp_path_factory.mktemp("engine"), CARD)


@pytest.fixture(scope="module")
def repeating(launch: Callable[..., TritonServer], engines: FakeEngines) -> Iterator[TritonServer]:
    """A server, of two front ends and the administration, whose operator takes tenant and priority from headers."""
    settings = {
        "engine_python": engines.folder / "python",
        "tenant_header": "X-Tenant",
        "priority_header": "Request-Class",
    }
    server = launch(settings=settings, instances=2)
    yield server
    server.stop()


def post(server: TritonServer, path: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(*server.http.split(":"), timeout=20)
    connection.request("POST", f"/v2/models/{path}", json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text.removeprefix("data: "))


def test_commands_over_generate_as_parameters_and_as_a_tensor(repeating):
    for path in ("generate", "generate_stream"):
        for body in (SHOW, {"parameters": SHOW}, {"request": json.dumps(SHOW)}):
            status, answer = post(repeating, f"multilora_adapters/{path}", body)
            assert (status, json.loads(answer["result"])) == (200, SHOWN)
        status, answer = post(repeating, f"multilora_adapters/{path}", {"action": "show", "name": "missing"})
        assert (status, answer) == (400, {"error": "LoRA missing is not supported"})


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_with_an_argument_that_is_none(repeating):
    url = f"http://{repeating.http}/v2/models/multilora_adapters/generate"
    body = '{"action": "load", "name": "a", "path": "/etc"}'
    out = subprocess.run(["curl", "-s", url, "-d", body], capture_output=True, text=True, timeout=20, check=True)
    assert json.loads(out.stdout)["error"].startswith("load: unknown argument 'path'")


@pytest.mark.parametrize("module", [httpclient, grpcclient])
def test_unary_calls(repeating, module):
    tensor = module.InferInput("request", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([json.dumps(SHOW).encode()], dtype=object))
    url = repeating.http if module is httpclient else repeating.grpc
    with module.InferenceServerClient(url) as client:
        result = client.infer("multilora_adapters", [tensor]).as_numpy("result")
        assert json.loads(result[0]) == SHOWN
        values = {"action": "preload", "name": "é", "wait": False, "timeout_s": 5}
        result = client.infer("multilora_adapters", [], parameters=values).as_numpy("result")
        assert json.loads(result[0]) == {**values, "token": ""}
        with pytest.raises(InferenceServerException, match="LoRA missing is not supported"):
            client.infer("multilora_adapters", [], parameters={"action": "show", "name": "missing"})


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_our_client(repeating, protocol):
    with Client(getattr(repeating, protocol), protocol=protocol, admin_token="t") as client:
        result = client._command("load", {"name": "x", "tenants": ["a"], "timeout_s": 5})
        assert result == {"action": "load", "name": "x", "tenants": ["a"], "timeout_s": 5.0, "token": "t"}
        client.adapters.alias("x", "y")


@pytest.fixture
def submitted(engines) -> Callable[[], tuple[str, int]]:
    """Tenant and priority of the request that reached the engine since the fixture or the last call."""
    count = len(engines.heard("Submit"))

    def last() -> tuple[str, int]:
        nonlocal count
        messages = wait_until(lambda: engines.heard("Submit")[count:])
        count += len(messages)
        return messages[-1].get("tenant", ""), messages[-1].get("priority", 0)

    return last


def grpc_request(server: TritonServer, parameters: dict[str, Any], headers: dict[str, str]) -> str:
    """The error of a request by gRPC stream, "" if there is none."""
    tensor = grpcclient.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"hello"], dtype=object))
    answers: list[Any] = []
    with grpcclient.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.append(error), headers=headers)
        client.async_stream_infer("multilora", [tensor], parameters={"max_tokens": 2, **parameters})
        wait_until(lambda: answers)
        client.stop_stream()
    return "" if answers[0] is None else answers[0].message()


def test_headers_say_who_asks_and_how_urgently(repeating, submitted):
    assert grpc_request(repeating, {}, {"x-tenant": "acme", "request-class": "-7"}) == ""
    assert submitted() == ("acme", -7)
    assert grpc_request(repeating, {}, {"x-other": "acme"}) == ""
    assert submitted() == ("", 0)


def test_a_client_cannot_contradict_a_header(repeating):
    said = grpc_request(repeating, {"tenant": "rival"}, {"x-tenant": "acme"})
    assert said == "tenant: is set by the header X-Tenant on this server, and must not be sent"
    for imitation in ("x-tenant", "X-TENANT"):
        said = grpc_request(repeating, {imitation: "rival"}, {"x-tenant": "acme"})
        assert "different values" in said


def test_generate_does_not_forward_headers_so_a_parameter_of_that_name_counts(repeating, submitted):
    """tritonserver 2.51; docs/adapters.md tells operators what follows from it."""
    body = {"text_input": "hello", "max_tokens": 2}
    status, _ = post(repeating, "multilora/generate", body, **{"X-Tenant": "acme"})
    assert (status, submitted()) == (200, ("", 0))
    status, _ = post(repeating, "multilora/generate", {**body, "X-Tenant": "acme", "Request-Class": "3"})
    assert (status, submitted()) == (200, ("acme", 3))


def test_while_the_engine_is_away_commands_say_so(repeating, engines):
    engines.behave(start_s=1.5)
    status, answer = post(repeating, "multilora_adapters/generate", {"action": "show", "name": "crash"})
    assert status == 400
    assert answer["error"].startswith("unavailable: the engine process ended before the command was answered")
    status, answer = post(repeating, "multilora_adapters/generate", SHOW)
    assert answer["error"].startswith("unavailable: the engine of model multilora is not there")
    with Client(repeating.grpc, retries=30) as patient:
        assert patient._command("show", {"name": "é"})["name"] == "é"
    engines.behave()
