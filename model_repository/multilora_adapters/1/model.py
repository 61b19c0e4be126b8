# SPDX-License-Identifier: Apache-2.0
"""Administration of adapters as a Triton model: this file only translates between Triton and the front end."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import triton_python_backend_utils as pb_utils

from multilora_backend.errors import MultiloraError
from multilora_backend.frontend import bridge
from multilora_backend.frontend.interface import ADMIN_INPUTS, ADMIN_OUTPUTS


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        for tensor in ADMIN_INPUTS:
            auto_complete_model_config.add_input(tensor)
        for tensor in ADMIN_OUTPUTS:
            auto_complete_model_config.add_output(tensor)
        # Not decoupled: one response a request, so that unary calls (/infer, ModelInfer) work as well.
        auto_complete_model_config.set_max_batch_size(0)
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Returns at once: the engine may not be there yet, or ever."""
        from multilora_backend.frontend import administration

        parameters = json.loads(args["model_config"]).get("parameters", {})
        try:
            serves, settings = administration.settings(
                {key: value["string_value"] for key, value in parameters.items()}, os.environ
            )
            name = args["model_name"]
            logging.basicConfig(
                level=settings.log_level.upper(), stream=sys.stderr, format=f"{name}: %(levelname)s %(message)s"
            )
            self._administration = administration.Administration(
                serves=serves, config=settings, instance=args["model_instance_name"], server_pid=os.getppid()
            )
        except MultiloraError as error:
            raise pb_utils.TritonModelException(error.message) from error
        self._administration.start()

    def execute(self, requests: list[Any]) -> None:
        """Returns at once; all answers come from the administration's own thread."""
        for request in requests:
            read = bridge.read(pb_utils, request, self._administration.refuse)
            if read is not None:
                self._administration.handle(*read)

    def is_ready(self) -> bool:
        """Asked by a Python backend newer than 24.10."""
        return self._administration.ready

    def finalize(self) -> None:
        self._administration.close()
