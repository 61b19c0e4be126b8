# SPDX-License-Identifier: Apache-2.0
"""The engine's administration in virtual time, over adapters whose states the test sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from multilora_backend.engine.administration import POLL_S, Administration
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.protocol import AdapterArguments, AdapterCommand, AdapterInfo, AdapterReply, Failed, encoder

COLD = AdapterInfo(
    name="",
    key="",
    version=None,
    versions=[],
    current=True,
    state="cold",
    since_s=0.0,
    reason="",
    history=[],
    level="disk",
    rank=0,
    bytes=0,
    pinned=False,
    aliases=[],
    source="",
    origin="admin",
    tenants=[],
    leases=0,
    holds=0,
    requests_total=0,
    loads_total=0,
    load_seconds=0.0,
    last_used_s=None,
    no_effect=False,
)


@dataclass
class Adapters:
    """Stands in for the manager: states change when the test says so."""

    infos: dict[str, AdapterInfo] = field(default_factory=dict)
    drains: set[str] = field(default_factory=set)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    written: bool = True

    def load(self, name: str, source: str = "", **given: Any) -> None:
        self.calls.append(("load", name, source, given))
        self.infos.setdefault(name, msgspec.structs.replace(COLD, name=name, key=name, source=source))

    def unload(self, name: str) -> None:
        self.calls.append(("unload", name))
        self.infos.pop(name, None)

    def show(self, name: str) -> AdapterInfo:
        if name not in self.infos:
            raise MultiloraError(ErrorCode.INVALID_ARG, f"LoRA {name} is not supported, we currently support []")
        return self.infos[name]

    def names(self, prefix: str = "", state: str = "") -> list[str]:
        infos = self.infos.items()
        return sorted(name for name, info in infos if name.startswith(prefix) and state in ("", info.state))

    def draining(self, name: str) -> bool:
        return name in self.drains

    def set(self, name: str, **fields: Any) -> None:
        self.infos[name] = msgspec.structs.replace(self.infos.get(name, COLD), name=name, **fields)

    def __getattr__(self, action: str) -> Any:
        return lambda *arguments: self.calls.append((action, *arguments))


class Bench:
    def __init__(self, token: str = "") -> None:
        self.now = 100.0
        self.adapters = Adapters()
        self.sent: list[tuple[str, AdapterReply | Failed]] = []
        self.administration = Administration(
            self.adapters, token, lambda frontend, message: self.sent.append((frontend, message)), lambda: self.now
        )
        self.ids = 0

    def do(self, action: str, frontend: str = "f", token: str = "", **arguments: Any) -> int:
        self.ids += 1
        self.administration.handle(
            frontend, AdapterCommand(self.ids, action, AdapterArguments(**arguments), token=token)
        )
        return self.ids

    def poll(self, seconds: float = POLL_S) -> None:
        self.now += seconds
        self.administration.poll()

    def answers(self) -> list[Any]:
        """What was sent since the last call: results, or code and message."""
        sent, self.sent = self.sent, []
        for _, message in sent:
            encoder.encode(message)
        return [m.result if isinstance(m, AdapterReply) else (m.code, m.message) for _, m in sent]
