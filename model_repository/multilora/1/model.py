# SPDX-License-Identifier: Apache-2.0
"""Triton's Python backend on one side, the front end on the other: this file only translates between the two."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from multilora_backend import config
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.frontend.interface import INPUTS, OUTPUTS

log = logging.getLogger("multilora_backend")


class TritonSender:
    """outbox.Sender over pb_utils. The outbox's thread alone calls it."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send(self, tensors: dict[str, np.ndarray], final: bool) -> None:
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in tensors.items()])
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)

    def fail(self, error: MultiloraError) -> None:
        code = getattr(pb_utils.TritonError, error.code.value)
        response = pb_utils.InferenceResponse([], pb_utils.TritonError(error.text, code))
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        for tensor in INPUTS:
            auto_complete_model_config.add_input(tensor)
        for tensor in OUTPUTS:
            auto_complete_model_config.add_output(tensor)
        auto_complete_model_config.set_model_transaction_policy({"decoupled": True})
        auto_complete_model_config.set_max_batch_size(0)
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Returns when the engine serves; a model that cannot be served fails to load with the engine's reason."""
        # Not above: Triton imports this file once more, in a process of its own, for auto_complete_config alone.
        from multilora_backend.frontend.request import RawRequest
        from multilora_backend.frontend.service import Service

        self._raw_request = RawRequest
        name, version = args["model_name"], args["model_version"]
        parameters = json.loads(args["model_config"]).get("parameters", {})
        try:
            settings, notes = config.load(
                Path(args["model_repository"]),
                version,
                {key: value["string_value"] for key, value in parameters.items()},
                os.environ,
            )
            logging.basicConfig(
                level=settings.log_level.upper(), stream=sys.stderr, format=f"{name}: %(levelname)s %(message)s"
            )
            for note in notes:
                log.warning("%s", note)
            self._service = Service(
                settings,
                model=name,
                version=version,
                instance=args["model_instance_name"],
                server_pid=os.getppid(),
                environ=os.environ,
            )
            card = self._service.start()
        except MultiloraError as error:
            raise pb_utils.TritonModelException(error.message) from error
        if settings.report_custom_metrics:
            self._report_metrics(name, version, card.max_model_len)

    def _report_metrics(self, name: str, version: str, max_model_len: int) -> None:
        from multilora_backend.frontend.metrics import Metrics

        try:
            self._service.report(Metrics(pb_utils.MetricFamily, name, version, max_model_len))
        except pb_utils.TritonModelException as error:
            log.warning("no custom metrics: %s", error)

    def execute(self, requests: list[Any]) -> None:
        """Returns at once; all answers come from the outbox's thread."""
        for request in requests:
            sender = TritonSender(request.get_response_sender())
            try:
                # Copied, since an array of numbers is a view of shared memory that goes when the request does.
                tensors = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
                raw = self._raw_request(tensors, json.loads(request.parameters() or "{}"))
            except (pb_utils.TritonModelException, ValueError) as error:
                self._service.refuse(sender, invalid("request", f"cannot be read: {error}"))
                continue
            except Exception as error:  # one unreadable request must not fail the others of this call
                log.exception("a request could not be read")
                problem = f"the request could not be read: {error}"
                self._service.refuse(sender, MultiloraError(ErrorCode.INTERNAL, problem))
                continue
            self._service.handle(raw, sender)

    def is_ready(self) -> bool:
        """Asked by a Python backend newer than 24.10: a model whose engine is being started again is not ready."""
        return self._service.ready

    def finalize(self) -> None:
        self._service.close()
