# SPDX-License-Identifier: Apache-2.0
"""Whom a link tells what comes from the engine."""

from __future__ import annotations

from multilora_backend.protocol import AdapterReply, Failed, Output, Ready, Retokenise, Stats


class Listener:
    """Hears nothing; whoever wants to hear something overrides it. All calls are made by the link's thread."""

    def on_ready(self, ready: Ready) -> None: ...

    def on_outputs(self, outputs: list[Output]) -> None: ...

    def on_failed(self, failed: Failed) -> None: ...

    def on_retokenise(self, message: Retokenise) -> None: ...

    def on_reply(self, reply: AdapterReply) -> None: ...

    def on_stats(self, stats: Stats, leads: bool) -> None: ...

    def on_lost(self, reason: str) -> None:
        """The engine died. Every request that it had not answered is lost."""
