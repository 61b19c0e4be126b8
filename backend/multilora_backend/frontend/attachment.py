# SPDX-License-Identifier: Apache-2.0
"""The engine of a model that other front ends serve: found in their runtime folder, never started from here."""

from __future__ import annotations

from multilora_backend.frontend import runtime
from multilora_backend.frontend.engine_process import EngineHandle, recorded


class AttachedEngine:
    """Implements `engine_process.Engines` for a front end that only administers."""

    leads = False

    def __init__(self, runtime_dir: str, model: str, server_pid: int) -> None:
        """`runtime_dir` is the served model's setting; `server_pid` is tritonserver's, whose engine it must be."""
        self._where = (runtime_dir, model, server_pid)
        self.address = ""

    def try_lead(self) -> bool:
        return False

    def attach_or_start(self) -> EngineHandle | None:
        """The living engine of the highest version that is loaded; None while there is none."""
        for folder in runtime.find(*self._where):
            handle = recorded(folder)
            if handle is not None:
                self.address = runtime.address(folder)
                return handle
        return None

    def end(self, handle: EngineHandle | None, patient: bool) -> None:
        """The engine is not ours to end."""
