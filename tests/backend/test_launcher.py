# SPDX-License-Identifier: Apache-2.0
"""Real servers with a stand-in model: what a launch passes on, and that nothing of it outlives it."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from multilora_backend import launch_arguments, launcher
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.launcher import TritonServer

REPOSITORY = Path(__file__).parent / "stand_in_repository"
ENGINE_STAYS = {"num_threads": 1}
LOAD_FAILS = {"log_level": "error"}


def get(address: str, path: str, body: dict | None = None) -> bytes:
    data = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(f"http://{address}{path}", data=data, timeout=10) as answer:
        return answer.read()


def eventually(done: Callable[[], bool], timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)
    return done()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def leftovers(server: TritonServer) -> list[Path]:
    return [*Path("/dev/shm").glob(f"*{server._memory_prefix}*"), *server._scratch.glob("*")]


@pytest.mark.e2e
def test_a_server_gets_its_configuration_answers_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/of/the/caller")
    log = tmp_path / "log"
    with TritonServer(
        model=tmp_path, instances=2, settings={"max_loras": 3}, host="localhost", log=log, repository=REPOSITORY
    ) as server:
        assert 0 < server.wait_ready(60) < 60
        assert len({server.http, server.grpc, server.metrics}) == 3

        answer = json.loads(get(server.http, "/v2/models/multilora/generate", {"text_input": "x", "lora_name": "a"}))
        instance, *words = answer["text_output"].split(" ")
        assert instance in ("multilora_0_0", "multilora_0_1")
        assert words == ["a", str(tmp_path), "3", "/of/the/caller"]
        assert json.loads(get(server.http, "/v2/models/multilora/config"))["instance_group"][0]["count"] == 2
        assert b"nv_inference_request_success" in get(server.metrics, "/metrics")
        assert stream(server.grpc) == ["base", str(tmp_path), "3", "/of/the/caller"]

        # The server, two stubs and two engines.
        pids = server.processes()
        assert len(pids) == 5
        assert server.pid in pids
        assert leftovers(server)

    assert server.poll() == 0
    assert not any(map(alive, pids))
    assert not leftovers(server)
    assert not server._scratch.exists()
    host, port = server.http.split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)
    server.stop()


def stream(address: str) -> list[str]:
    """The words of a streamed request without adapter, but for the instance's name."""
    results: queue.Queue = queue.Queue()
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"x"], dtype=object))
    flag = triton.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([True]))
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        client.async_stream_infer("multilora", [text, flag], enable_empty_final_response=True)
        words = []
        while True:
            result, error = results.get(timeout=10)
            assert error is None
            if result.get_response().parameters["triton_final_response"].bool_param:
                return words[1:]
            words.append(result.as_numpy("text_output")[0].decode())


@pytest.mark.e2e
def test_an_engine_that_does_not_leave_is_ended_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_LEAVE_S", 0.5)
    with TritonServer(settings=ENGINE_STAYS, log=tmp_path / "log", repository=REPOSITORY) as server:
        server.wait_ready(60)
        pids = server.processes()
    assert len(pids) == 3
    assert not any(map(alive, pids))


@pytest.mark.e2e
def test_after_a_kill_the_rest_can_be_seen_and_destroyed(tmp_path: Path) -> None:
    with TritonServer(log=tmp_path / "log", repository=REPOSITORY) as server:
        server.wait_ready(60)
        get(server.http, "/v2/models/multilora/generate", {"text_input": "x"})
        server.kill()
        assert server.poll() == -signal.SIGKILL
        # An idle stub may have noticed and left; the stand-in's engine, unlike the real one, never does.
        assert 1 <= len(server.processes()) <= 2
        assert leftovers(server)
        server.destroy()
        assert server.processes() == []
        assert not leftovers(server)


@pytest.mark.e2e
def test_a_model_that_does_not_load_is_reported_at_once_with_the_log(tmp_path: Path) -> None:
    with TritonServer(settings=LOAD_FAILS, log=tmp_path / "log", repository=REPOSITORY) as server:
        started = time.monotonic()
        with pytest.raises(MultiloraError, match="the stand-in was told to fail") as error:
            server.wait_ready(60)
        assert time.monotonic() - started < 30
    assert error.value.code is ErrorCode.UNAVAILABLE
    assert "ended with status 1 before it was ready" in error.value.message
    assert server.processes() == []


@pytest.mark.e2e
def test_a_server_does_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    program = f"""
import pathlib, time
from multilora_backend.launcher import TritonServer
server = TritonServer(repository=pathlib.Path({str(REPOSITORY)!r}), log=pathlib.Path({str(tmp_path / "log")!r}))
server.wait_ready(60)
print(*server.processes(), flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed launcher leaves its scratch folder
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(alive, pids))
        owner.kill()
    assert eventually(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "/no/such/folder"}, "^model: /no/such/folder does not exist"),
        ({"adapters": "/no/such.yaml"}, "^adapters: /no/such.yaml does not exist"),
        ({"settings": {"max_lora": 3}}, "^settings: unknown key 'max_lora'"),
        ({"settings": {"max_loras": "three"}}, "^max_loras: must be of type int, got 'three'"),
        ({"host": "no.such.host.invalid"}, "^host: 'no.such.host.invalid' is not an address"),
        ({"host": "203.0.113.1"}, "^(http|grpc|metrics)_port: cannot listen on 203.0.113.1:0"),
        ({"grpc_port": 65536}, "^grpc_port: must be 0 to 65535, got 65536"),
        ({"instances": -1}, "^instances: must be at least 1, got -1"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_anything_starts(arguments: dict, message: str) -> None:
    with pytest.raises(MultiloraError, match=message) as error:
        TritonServer(repository=REPOSITORY, **arguments)
    assert error.value.code is ErrorCode.INVALID_ARG


def test_ports_are_free_different_and_not_already_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(MultiloraError, match=f"^http_port: cannot listen on 127.0.0.1:{taken}: .*in use"):
            launch_arguments.ports("127.0.0.1", {"http": taken, "grpc": 0})
    chosen = launch_arguments.ports("127.0.0.1", {"http": 0, "grpc": taken, "metrics": 0})
    assert chosen["grpc"] == taken
    assert len(set(chosen.values())) == 3
    with pytest.raises(MultiloraError, match="_port: cannot listen"):
        launch_arguments.ports("127.0.0.1", {"http": taken, "grpc": taken})


@pytest.mark.parametrize(
    "group", ["", "instance_group [ { kind: KIND_CPU } ]", "instance_group [ { count: 1 } ]\n" * 2]
)
def test_a_repository_whose_instances_cannot_be_set_is_refused(tmp_path: Path, group: str) -> None:
    model = tmp_path / "source" / "multilora"
    model.mkdir(parents=True)
    (model / "config.pbtxt").write_text(f'name: "multilora"\ndynamic_batching {{ count: 7 }}\n{group}')
    with pytest.raises(MultiloraError, match="must have one instance_group with a count"):
        launch_arguments.with_instances(tmp_path / "source", tmp_path / "target", 2)
