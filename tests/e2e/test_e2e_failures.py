# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, engines and servers that die, folders that are broken, on servers that serve nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from multilora_backend.launcher import TritonServer
from tiny.tasks import TASKS, held_out_words
from triton_calls import Stream, grpc_call, http_post, in_threads

GREEDY = {"temperature": 0.0, "max_tokens": 32}
# Long enough to be caught in the act: the base never ends by itself with ignore_eos.
ENDLESS = json.dumps({"temperature": 0.0, "max_tokens": 400, "ignore_eos": True})


def commands(server: TritonServer) -> dict[int, str]:
    """Command line of each process of a server, by pid."""
    found = {}
    for pid in server.processes():
        with suppress(OSError):  # it has just ended
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def engine_pid(server: TritonServer) -> int:
    [pid] = [pid for pid, command in commands(server).items() if "multilora_backend.engine" in command]
    return pid


def ask(server: TritonServer, word: str = "hello", name: str = "upper") -> str:
    answer = grpc_call(server.grpc, {"text_input": word, "lora_name": name, "stream": True}, GREEDY)
    if answer.error is not None:
        raise answer.error
    return answer.text


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def spoil(path: Path) -> None:
    """One NaN in the middle of the first tensor."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[tensors[name].numel() // 2] = torch.nan
    save_file(tensors, path)


@pytest.fixture(scope="module")
def spoilt(launch: Callable[..., TritonServer], tmp_path_factory: pytest.TempPathFactory) -> TritonServer:
    """A server of the example's adapters, each but `upper` broken in another way, and of one for another base."""
    import tiny_models

    root = tmp_path_factory.mktemp("spoilt")
    source = Path(__file__).resolve().parents[2] / "examples/tiny/adapters"
    folder = shutil.copytree(source, root / "adapters")
    (folder / "reverse/adapter_model.safetensors").unlink()
    weights = folder / "rot13/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = folder / "double/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    (folder / "devowel/adapter_config.json").write_text("{ this is no JSON")
    spoil(folder / "sort/adapter_model.safetensors")
    tiny_models.save_llama(root / "other", vocab_size=300)
    tiny_models.save_adapter(root / "other", folder / "foreign", 0)
    return launch(adapters=folder)


@pytest.fixture(scope="module")
def without_adapters(launch: Callable[..., TritonServer]) -> TritonServer:
    return launch(adapters="")


def test_a_cancelled_grpc_stream_frees_its_sequence(spoilt, metrics):
    m = metrics(spoilt)
    streams = [Stream(spoilt.grpc) for _ in range(4)]
    answers = [
        s.send({"text_input": "hello", "stream": True, "sampling_parameters": ENDLESS, "lora_name": "upper"})
        for s in streams
    ]
    wait_until(lambda: all(a.responses for a in answers), 20, "the streams do not run")
    for stream in streams:
        stream.close(cancel=True)
    m.wait("vllm:num_requests_running", 0)
    assert all(len(a.responses) < 400 for a in answers), "they ended by themselves: nothing was shown"


def test_an_http_client_that_hangs_up_frees_its_sequence(spoilt, metrics):
    m = metrics(spoilt)
    body = {"text_input": "hello", "stream": True, "sampling_parameters": ENDLESS}
    request = urllib.request.Request(
        f"http://{spoilt.http}/v2/models/multilora/generate_stream", json.dumps(body).encode(), method="POST"
    )
    before = m.value("vllm:generation_tokens_total")
    with urllib.request.urlopen(request, timeout=20) as response:
        response.readline()
    m.wait("vllm:num_requests_running", 0)
    assert m.value("vllm:generation_tokens_total") - before < 400


def test_broken_adapters_fail_by_themselves(spoilt, metrics):
    assert ask(spoilt) == "HELLO"
    reasons = {
        "reverse": "adapter_model.safetensors",
        "rot13": "adapter_model.safetensors",
        "double": "use_dora",
        "devowel": "adapter_config.json",
        "sort": "NaN",
    }
    for name, reason in reasons.items():
        answer = grpc_call(spoilt.grpc, {"text_input": "hello", "lora_name": name}, GREEDY)
        assert reason.lower() in answer.error.message().lower(), name
    assert ask(spoilt) == "HELLO"
    # With the one for another base, whose headers have been read at the start like all others'.
    metrics(spoilt).wait("multilora:adapters", len(reasons) + 1.0, state="failed")


def test_an_adapter_of_another_base_is_refused(spoilt):
    answer = grpc_call(spoilt.grpc, {"text_input": "hello", "lora_name": "foreign"}, GREEDY)
    assert "shape" in answer.error.message()
    assert grpc_call(spoilt.grpc, {"text_input": "hello", "exclude_input_in_output": True}, GREEDY).text == "hello"


def test_kill_9_of_the_stub_leaves_no_engine_that_nobody_can_reach(spoilt):
    """The last of that server."""
    assert ask(spoilt) == "HELLO"
    [stub] = [pid for pid, command in commands(spoilt).items() if "/multilora/1/model.py" in command]
    engine = engine_pid(spoilt)
    os.kill(stub, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{engine}").exists(), 30, "the engine stayed")
    spoilt.stop()


def test_two_front_ends_share_one_engine_and_kill_9_of_it(launch, metrics):
    server = launch(instances=2)
    stubs = [c for c in commands(server).values() if "/multilora/1/model.py" in c]
    assert len(stubs) == 2
    words = held_out_words(40, seed=9)
    names = list(TASKS)[1:]

    def call(i: int):
        return lambda: ask(server, words[i], names[i % len(names)])

    answers = in_threads(call(i) for i in range(40))
    assert sum(a == TASKS[names[i % len(names)]](words[i]) for i, a in enumerate(answers)) >= 39
    metrics(server).wait("multilora:adapters", 6.0, state="active")

    streams = [Stream(server.grpc) for _ in range(6)]
    flying = [s.send({"text_input": "hello", "stream": True, "sampling_parameters": ENDLESS}) for s in streams]
    wait_until(lambda: all(a.responses for a in flying), 20, "the streams do not run")
    old = engine_pid(server)
    os.kill(old, signal.SIGKILL)
    for answer in flying:
        assert answer.done.wait(10), "a request in flight was left hanging"
        # The front end that has started the engine also knows by what.
        assert re.match("internal: the engine process ended( by SIGKILL)?;", answer.error.message())
    refused = grpc_call(server.grpc, {"text_input": "hello"}, GREEDY)
    if refused.error is not None:  # the restart may have been quicker
        assert refused.error.status() == "StatusCode.UNAVAILABLE"
    for stream in streams:
        stream.close()

    def all_work() -> bool:
        assert server.poll() is None, server.log_tail()
        statuses = [http_post(server.http, "generate", {"text_input": "hello", **GREEDY})[0] for _ in range(6)]
        assert set(statuses) <= {200, 400}
        return statuses == [200] * 6

    wait_until(all_work, 60, "not both front ends came back")
    assert engine_pid(server) != old
    assert ask(server) == "HELLO"
    server.stop()
    assert server.processes() == []


def test_a_vllm_backend_deployment_can_be_pointed_at_us(tmp_path: Path, launch):
    """A version folder with model.json and multi_lora.json, and nothing else set."""
    root = Path(__file__).resolve().parents[2]
    shutil.copytree(root / "model_repository", tmp_path / "repository")
    version = tmp_path / "repository/multilora/1"
    arguments = {"model": str(root / "examples/tiny/model"), "enable_lora": "true", "max_loras": 2, "max_lora_rank": 16}
    arguments |= {"gpu_memory_utilization": 0.5, "enforce_eager": True, "disable_log_requests": "true"}
    (version / "model.json").write_text(json.dumps(arguments))
    names = {name: str(root / "examples/tiny/adapters" / name) for name in ("upper", "sort")}
    (version / "multi_lora.json").write_text(json.dumps(names))
    server = launch(model="", adapters="", repository=tmp_path / "repository")
    assert ask(server, name="sort") == "ehllo"
    answer = grpc_call(server.grpc, {"text_input": "hello", "lora_name": "rot13"})
    assert "LoRA rot13 is not supported, we currently support ['upper', 'sort']" in answer.error.message()


def test_a_model_without_adapters_has_lora_switched_off(without_adapters):
    answer = grpc_call(without_adapters.grpc, {"text_input": "hello", "lora_name": "upper"}, GREEDY)
    assert "LoRA feature is not enabled." in answer.error.message()
    assert grpc_call(without_adapters.grpc, {"text_input": "hello", "exclude_input_in_output": True}, GREEDY).text


def test_kill_9_of_the_server_leaves_no_engine(without_adapters):
    """The last of that server."""
    assert len(commands(without_adapters)) >= 3
    without_adapters.kill()
    wait_until(lambda: not without_adapters.processes(), 30, f"left behind: {commands(without_adapters)}")


def test_requests_in_flight_finish_before_a_stop_and_nothing_is_left(launch):
    server = launch(drain_s=20)
    assert len(commands(server)) >= 3, "the server, its stub and the engine"
    stream = Stream(server.grpc)
    answer = stream.send({"text_input": "hello", "stream": True, "sampling_parameters": ENDLESS})
    wait_until(lambda: bool(answer.responses), 20, "the stream does not run")
    thread = threading.Thread(target=server.stop)
    thread.start()
    assert answer.done.wait(30)
    assert answer.error is None
    assert len(answer.responses) > 1
    stream.close()
    thread.join(40)
    assert server.processes() == []
