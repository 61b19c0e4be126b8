# SPDX-License-Identifier: Apache-2.0
"""model.py with a pb_utils of our own: the translation between Triton's Python backend and the front end."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_pb_utils
from fake_pb_utils import ModelConfig, Request, Tensor, TritonError, TritonModelException
from frontend_fakes import wait_until
from multilora_backend.errors import ErrorCode
from multilora_backend.frontend import interface, sampling, service

REPOSITORY = Path(__file__).resolve().parents[3] / "model_repository" / "multilora"


@pytest.fixture
def model_py(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_pb_utils)
    spec = importlib.util.spec_from_file_location("multilora_model_py", REPOSITORY / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def initialize(model_py, engines, monkeypatch) -> Iterator[Callable[..., Any]]:
    """A model initialised as Triton does it, finalised after the test."""
    models = []

    def make(folder: Path = REPOSITORY, **parameters: str) -> Any:
        parameters = {
            "model": str(engines.folder),
            "engine_python": str(engines.folder / "python"),
            "runtime_dir": str(engines.runtime),
            **parameters,
        }
        # The engine ends front ends whose server is gone: it must not be this process's parent that it watches.
        monkeypatch.setattr(model_py.os, "getppid", model_py.os.getpid)
        model = model_py.TritonPythonModel()
        config = {"parameters": {key: {"string_value": value} for key, value in parameters.items() if value}}
        model.initialize(
            {
                "model_name": "multilora",
                "model_version": "1",
                "model_instance_name": "multilora_0_0",
                "model_repository": str(folder),
                "model_config": json.dumps(config),
            }
        )
        models.append(model)
        return model

    yield make
    for model in models:
        model.finalize()


def execute(model: Any, *requests: Request) -> None:
    assert model.execute(list(requests)) is None


def test_a_stream_ends_with_the_final_flag_on_its_last_response(initialize):
    request = Request('{"max_tokens": 6, "temperature": 0.5}', text_input="abc", stream=True)
    execute(initialize(), request)
    sender = request.sender.wait()
    assert sender.code is None
    assert sender.text.startswith("abc")
    assert len(sender.responses) > 1


def test_without_streaming_there_is_one_response_with_its_extra_outputs(initialize):
    request = Request(
        text_input="abc",
        sampling_parameters='{"max_tokens": "4", "lora_name": "x"}',
        return_num_output_tokens=True,
        return_finish_reason=True,
    )
    execute(initialize(adapters=str(REPOSITORY)), request)
    [response] = request.sender.wait().responses
    assert response["text_output"][0].startswith(b"abc"), "the prompt is repeated by default"
    assert response["finish_reason"][0] == b"length"
    assert response["num_output_tokens"].dtype == np.uint32
    assert list(response["num_output_tokens"]) == [4]


def test_each_request_of_a_call_gets_its_own_answer_or_error(initialize):
    bad = {
        "is not JSON": Request(text_input="abc", sampling_parameters="{"),
        "max_tokens": Request('{"max_tokens": -2}', text_input="abc"),
        "cannot be read": Request("{not json", text_input="abc"),
        "'x-tenant' twice": Request('{"x-tenant": "rival", "x-tenant": "acme"}', text_input="abc"),
        "UTF-8": Request(text_input=b"\xff\xfe"),
        "text_input": Request(),
        "not supported": Request(text_input="abc", image="x"),
    }
    good = Request('{"max_tokens": 3}', text_input="abc")
    execute(initialize(), *bad.values(), good)
    assert good.sender.wait().code is None
    for words, request in bad.items():
        sender = request.sender.wait()
        assert words in sender.message
        assert sender.code == (TritonError.UNSUPPORTED if words == "not supported" else TritonError.INVALID_ARG)


def test_a_request_that_breaks_the_bridge_is_answered(initialize):
    class Broken(Request):
        def inputs(self) -> list[Tensor]:
            raise MemoryError("no memory for a copy")

    broken, good = Broken(), Request('{"max_tokens": 3}', text_input="abc")
    execute(initialize(), broken, good)
    assert broken.sender.wait().code == TritonError.INTERNAL
    assert good.sender.wait().code is None


def test_a_request_that_waits_does_not_read_memory_that_triton_uses_again(initialize):
    model = initialize()
    release = threading.Event()
    for _ in range(service.PARSE_THREADS):
        model._service._pool.submit(release.wait)
    request = Request(text_input="x" * (service.INLINE_BYTES + 1), stream=True, exclude_input_in_output=True)
    execute(model, request)
    request.arrays["exclude_input_in_output"].fill(False)  # which a stream must not ask for
    release.set()
    assert request.sender.wait().message.startswith("text_input")


def test_every_code_of_ours_is_one_of_tritons(model_py):
    assert all(hasattr(TritonError, code.value) for code in ErrorCode)


def test_cancellation_goes_through(initialize, engines):
    request = Request('{"lora_name": "stuck"}', text_input="abc", stream=True)
    execute(initialize(adapters=str(REPOSITORY)), request)
    wait_until(lambda: engines.heard("Submit"))
    request.sender.cancelled = True
    assert request.sender.wait().code == TritonError.CANCELLED
    assert request.sender.message == "Request was cancelled"
    wait_until(lambda: engines.heard("Abort"))


@pytest.mark.parametrize(
    ("orders", "parameters", "message"),
    [
        ({"refuse": "adapters: x does not exist"}, {}, "adapters: x does not exist"),
        ({}, {"no_such_key": "1"}, "no_such_key"),
        ({}, {"model": ""}, "model: is required"),
    ],
)
def test_a_model_that_cannot_be_served_fails_to_load_with_the_reason(initialize, engines, orders, parameters, message):
    engines.behave(**orders)
    with pytest.raises(TritonModelException, match=message):
        initialize(**parameters)


def test_readiness_follows_the_engine(initialize, engines):
    model = initialize(adapters=str(REPOSITORY))
    assert model.is_ready()
    engines.behave(start_s=0.3)
    request = Request('{"lora_name": "crash"}', text_input="abc")
    execute(model, request)
    assert "ended with status 9" in request.sender.wait().message
    assert not model.is_ready()
    wait_until(model.is_ready)


def test_a_vllm_backend_folder_is_served_as_it_is(initialize, tmp_path):
    version = tmp_path / "vllm" / "1"
    version.mkdir(parents=True)
    (version / "model.json").write_text(
        json.dumps({"model": "../weights", "enable_lora": "true", "max_loras": 2, "disable_log_requests": "true"})
    )
    (version / "multi_lora.json").write_text('{"doll": "/loras/doll"}')
    model = initialize(tmp_path / "vllm", model="")
    assert model._service._config.model == str(tmp_path / "vllm" / "weights")
    assert model._service._config.max_loras == 2


def test_the_declared_tensors_are_those_that_requests_and_responses_have(model_py, initialize):
    config = model_py.TritonPythonModel.auto_complete_config(ModelConfig())
    assert config.policy == {"decoupled": True}
    assert config.max_batch_size == 0
    names = {tensor["name"] for tensor in config.inputs}
    assert names == {*sampling.INPUTS, "lora_name", "adapter", "image", "embedding_request"}
    assert all(tensor["optional"] for tensor in config.inputs)
    wanted = {tensor["name"]: True for tensor in interface.INPUTS if tensor["name"].startswith("return_")}
    request = Request('{"max_tokens": 3}', text_input="abc", **wanted)
    execute(initialize(), request)
    [response] = request.sender.wait().responses
    types_ = {"TYPE_STRING": np.object_, "TYPE_FP32": np.float32, "TYPE_UINT32": np.uint32}
    assert {name: array.dtype for name, array in response.items()} == {
        tensor["name"]: types_[tensor["data_type"]] for tensor in config.outputs
    }


def test_model_py_stays_a_bridge():
    source = (REPOSITORY / "1" / "model.py").read_text()
    assert len(source.splitlines()) <= 150
    assert "import torch" not in source
