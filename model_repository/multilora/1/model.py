# SPDX-License-Identifier: Apache-2.0
"""Triton's Python backend on one side, the front end on the other: this file only translates between the two."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from multilora_backend import config
from multilora_backend.errors import MultiloraError
from multilora_backend.frontend import bridge
from multilora_backend.frontend.interface import INPUTS, OUTPUTS

log = logging.getLogger("multilora_backend")


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
            budgets = {"adapters": settings.metrics_adapters, "tenants": settings.metrics_tenants}
            self._report_metrics(name, version, card.max_model_len, budgets)

    def _report_metrics(self, name: str, version: str, max_model_len: int, budgets: dict[str, int]) -> None:
        from multilora_backend.frontend.metrics import Metrics

        try:
            self._service.report(Metrics(pb_utils.MetricFamily, name, version, max_model_len, **budgets))
        except pb_utils.TritonModelException as error:
            log.warning("no custom metrics: %s", error)

    def execute(self, requests: list[Any]) -> None:
        """Returns at once; all answers come from the outbox's thread."""
        for request in requests:
            read = bridge.read(pb_utils, request, self._service.refuse)
            if read is not None:
                tensors, parameters, sender = read
                self._service.handle(self._raw_request(tensors, parameters), sender)

    def is_ready(self) -> bool:
        """Asked by a Python backend newer than 24.10: a model whose engine is being started again is not ready."""
        return self._service.ready

    def finalize(self) -> None:
        self._service.close()
