# SPDX-License-Identifier: Apache-2.0
"""The administration front end attaches to the engine of another model, outlives it, and never keeps it alive."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_pb_utils
from fake_pb_utils import ModelConfig, Request, TritonError, TritonModelException
from frontend_fakes import FakeEngines, FakeSender, wait_until
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend import administration
from multilora_backend.frontend.administration import Administration
from multilora_backend.frontend.service import Service
from multilora_backend.processes import Process

REPOSITORY = Path(__file__).resolve().parents[3] / "model_repository" / "multilora_adapters"


@pytest.fixture
def serve(engines: FakeEngines) -> Iterator[Callable[..., Service]]:
    """A front end of the model "multilora" of this server, which starts the engine."""
    made: list[Service] = []

    def start(model: str = "multilora", version: str = "1") -> Service:
        pid = os.getpid()
        service = Service(
            engines.config(), model=model, version=version, instance="m", server_pid=pid, environ=os.environ
        )
        made.append(service)
        service.start()
        return service

    yield start
    for service in made:
        service.close()
    assert not any(Process.of(pid).alive for pid in engines.pids()), "an engine was left behind"


@pytest.fixture
def administer(engines: FakeEngines) -> Iterator[Callable[..., Administration]]:
    made: list[Administration] = []

    def start(serves: str = "multilora", server_pid: int = 0) -> Administration:
        config = engines.config()
        made.append(Administration(serves=serves, config=config, instance="a", server_pid=server_pid or os.getpid()))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each.close()


def ask(admin: Administration, **values: Any) -> FakeSender:
    sender = FakeSender()
    admin.handle({}, values, sender)
    return sender


def answer(sender: FakeSender) -> dict[str, Any]:
    sender.wait()
    assert sender.error is None, sender.error
    [response] = sender.responses
    assert response["result"].shape == (1,)
    return json.loads(response["result"][0])


def test_commands_reach_the_engine_of_the_served_model(serve, administer):
    admin = administer()
    serve()
    wait_until(lambda: admin.ready)
    told = answer(ask(admin, action="load", name="é", source="x", tenants="a,b", token="t"))
    assert told == {"action": "load", "token": "t", "name": "é", "source": "x", "tenants": ["a", "b"]}
    error = ask(admin, action="show", name="missing").wait().error
    assert (error.code, error.message) == (ErrorCode.INVALID_ARG, "LoRA missing is not supported")
    senders = [ask(admin, action="show", name=f"a{i}") for i in range(50)]
    assert [answer(sender)["name"] for sender in senders] == [f"a{i}" for i in range(50)]
    assert {name for sender in senders for name in sender.threads} == {"answers"}, "one thread alone may answer"


def test_without_an_engine_it_starts_at_once_and_says_what_is_missing(administer):
    error = ask(administer(), action="list").wait().error
    assert error.code is ErrorCode.UNAVAILABLE
    assert error.text == "unavailable: the engine of model multilora is not there; please retry"


def test_a_bad_command_needs_no_engine(administer):
    error = ask(administer(), action="load").wait().error
    assert (error.code, error.message) == (ErrorCode.INVALID_ARG, "name: is required by load")


def test_it_finds_only_the_model_that_it_serves_in_its_own_server(serve, administer):
    serve("another")
    other, foreign = administer(), administer("another", server_pid=os.getppid())
    right = administer("another")
    wait_until(lambda: right.ready)
    assert not other.ready
    assert not foreign.ready


def test_the_engines_death_fails_what_is_in_flight_and_the_next_one_is_found(serve, administer, engines):
    serve()
    admin = administer()
    wait_until(lambda: admin.ready)
    waiting = ask(admin, action="show", name="stuck")
    crash = ask(admin, action="show", name="crash")
    for sender in (waiting, crash):
        error = sender.wait().error
        assert error.code is ErrorCode.UNAVAILABLE
        assert error.message == "the engine process ended before the command was answered; please retry"
    wait_until(lambda: admin.ready)
    assert answer(ask(admin, action="show", name="x"))["name"] == "x"
    assert len(engines.pids()) == 2


def test_an_engine_does_not_live_on_for_its_administration(serve, administer, engines):
    service = serve()
    admin = administer()
    wait_until(lambda: admin.ready)
    [pid] = engines.pids()
    began = time.monotonic()
    service.close()
    assert not Process.of(pid).alive
    assert time.monotonic() - began < 4, "it left only because it was ended"
    wait_until(lambda: not admin.ready)
    # What became of the engine is known a moment after it is gone.
    why = "the engine of model multilora is not there (the engine process ended)"
    wait_until(lambda: ask(admin, action="list").wait().error.message.startswith(why))


def test_closing_fails_what_waits(serve, administer):
    serve()
    admin = administer()
    wait_until(lambda: admin.ready)
    sender = ask(admin, action="show", name="stuck")
    admin.close()
    assert sender.wait().error.code is ErrorCode.UNAVAILABLE


def test_too_many_commands_are_refused(serve, administer, monkeypatch):
    monkeypatch.setattr(administration, "MAX_COMMANDS", 2)
    serve()
    admin = administer()
    wait_until(lambda: admin.ready)
    for _ in range(2):
        ask(admin, action="show", name="stuck")
    error = ask(admin, action="list").wait().error
    assert (error.code, "which is the limit" in error.message) == (ErrorCode.UNAVAILABLE, True)


def test_a_client_that_is_gone_does_not_keep_others_from_their_answers(administer):
    class Gone(FakeSender):
        def fail(self, error: MultiloraError) -> None:
            raise RuntimeError("no such request")

    admin = administer()
    admin.handle({}, {"action": "list"}, Gone())
    assert ask(admin, action="list").wait().error.code is ErrorCode.UNAVAILABLE


def test_the_settings_are_those_of_the_served_model():
    environ = {"MULTILORA_RUNTIME_DIR": "/run/x", "MULTILORA_MODEL": "/m", "MULTILORA_TENANT_HEADER": "X-T"}
    serves, config = administration.settings({"runtime_dir": "/other", "priority_header": "X-P"}, environ)
    assert (serves, config.runtime_dir, config.tenant_header, config.priority_header) == (
        "multilora",
        "/run/x",
        "X-T",
        "X-P",
    )
    assert administration.settings({"serves": "llama", "EXECUTION_ENV_PATH": "x"}, {})[0] == "llama"
    with pytest.raises(MultiloraError, match=r"config\.pbtxt parameters: unknown key 'max_loras'"):
        administration.settings({"max_loras": "3"}, {})


@pytest.fixture
def model_py(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_pb_utils)
    spec = importlib.util.spec_from_file_location("multilora_adapters_model_py", REPOSITORY / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.os, "getppid", module.os.getpid)
    return module


def test_the_triton_model(model_py, serve, engines, monkeypatch):
    config = model_py.TritonPythonModel.auto_complete_config(ModelConfig())
    assert not hasattr(config, "policy"), "not decoupled: unary calls must work"
    assert [tensor["name"] for tensor in (*config.inputs, *config.outputs)] == ["request", "result"]
    arguments = {"model_name": "multilora_adapters", "model_instance_name": "multilora_adapters_0_0"}
    model = model_py.TritonPythonModel()
    with pytest.raises(TritonModelException, match="unknown key 'x'"):
        model.initialize({**arguments, "model_config": '{"parameters": {"x": {"string_value": "y"}}}'})
    monkeypatch.setenv("MULTILORA_RUNTIME_DIR", str(engines.runtime))
    model.initialize({**arguments, "model_config": "{}"})
    serve()
    wait_until(model.is_ready)
    requests = [
        Request(request='{"action": "show", "name": "a"}'),
        Request('{"action": "show", "name": "b"}'),
        Request("{not json"),
        Request('{"action": "show", "name": "missing"}'),
    ]
    assert model.execute(requests) is None
    good, also, unread, missing = (request.sender.wait() for request in requests)
    for sender, name in ((good, "a"), (also, "b")):
        [response] = sender.responses
        assert response["result"].dtype == np.object_
        assert json.loads(response["result"][0])["name"] == name
    assert (unread.code, missing.code) == (TritonError.INVALID_ARG, TritonError.INVALID_ARG)
    assert missing.message == "LoRA missing is not supported"
    model.finalize()


def test_both_models_stay_bridges():
    source = (REPOSITORY / "1" / "model.py").read_text()
    assert len(source.splitlines()) <= 100
    assert "import torch" not in source
