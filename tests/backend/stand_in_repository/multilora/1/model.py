# SPDX-License-Identifier: Apache-2.0
"""One word a response about itself; its `engine` is a process in a session of its own that ignores SIGTERM."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import triton_python_backend_utils as pb_utils

ENGINE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        if os.environ.get("MULTILORA_LOG_LEVEL") == "error":  # how a test asks for a model that does not load
            raise pb_utils.TritonModelException("the stand-in was told to fail")
        self.instance = args["model_instance_name"]
        self.engine = subprocess.Popen(["python3", "-c", ENGINE], start_new_session=True)

    def execute(self, requests: list) -> None:
        for request in requests:
            adapter = pb_utils.get_input_tensor_by_name(request, "lora_name")
            words = [
                self.instance,
                "base" if adapter is None else adapter.as_numpy()[0].decode(),
                os.environ.get("MULTILORA_MODEL", ""),
                os.environ.get("MULTILORA_MAX_LORAS", ""),
                os.environ.get("MLENGINE_LD_LIBRARY_PATH", "unset"),
            ]
            stream = pb_utils.get_input_tensor_by_name(request, "stream")
            sender = request.get_response_sender()
            if words[1] == "unknown":
                error = pb_utils.TritonError("the stand-in has no such adapter", pb_utils.TritonError.INVALID_ARG)
                response = pb_utils.InferenceResponse([], error)
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            for word in words if stream is not None and stream.as_numpy()[0] else [" ".join(words)]:
                text = np.array([word], dtype=object)
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        if os.environ.get("MULTILORA_NUM_THREADS") != "1":  # how a test asks for an engine that stays
            self.engine.kill()
