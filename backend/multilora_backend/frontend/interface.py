# SPDX-License-Identifier: Apache-2.0
"""The tensors of the Triton model, as `auto_complete_config` declares them: vllm_backend's, `messages` and adapters.

`image` and `embedding_request` are declared to be refused with the reason; without them a client that sends one would
hear of an unexpected input only.
"""

from __future__ import annotations

from typing import TypedDict


class Tensor(TypedDict, total=False):
    name: str
    data_type: str
    dims: list[int]
    optional: bool


def _input(name: str, data_type: str, dim: int = 1) -> Tensor:
    return {"name": name, "data_type": data_type, "dims": [dim], "optional": True}


def _output(name: str, data_type: str, dim: int = -1) -> Tensor:
    return {"name": name, "data_type": data_type, "dims": [dim]}


# All are optional for Triton: one of text_input and messages is needed, which `request.parse` checks.
INPUTS = [
    _input("text_input", "TYPE_STRING"),
    _input("messages", "TYPE_STRING"),
    _input("stream", "TYPE_BOOL"),
    _input("sampling_parameters", "TYPE_STRING"),
    _input("lora_name", "TYPE_STRING"),
    _input("adapter", "TYPE_STRING"),
    _input("exclude_input_in_output", "TYPE_BOOL"),
    _input("return_finish_reason", "TYPE_BOOL"),
    _input("return_cumulative_logprob", "TYPE_BOOL"),
    _input("return_logprobs", "TYPE_BOOL"),
    _input("return_num_input_tokens", "TYPE_BOOL"),
    _input("return_num_output_tokens", "TYPE_BOOL"),
    _input("image", "TYPE_STRING", -1),
    _input("embedding_request", "TYPE_STRING"),
]
OUTPUTS = [
    _output("text_output", "TYPE_STRING"),
    _output("finish_reason", "TYPE_STRING"),
    _output("cumulative_logprob", "TYPE_FP32"),
    _output("logprobs", "TYPE_STRING"),
    _output("num_input_tokens", "TYPE_UINT32", 1),
    _output("num_output_tokens", "TYPE_UINT32"),
]

# Of the model multilora_adapters, see `commands`.
ADMIN_INPUTS = [_input("request", "TYPE_STRING")]
ADMIN_OUTPUTS = [_output("result", "TYPE_STRING", 1)]
