# SPDX-License-Identifier: Apache-2.0
"""What a client is told once, the same for the sync and the asyncio client."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

from multilora_client.exchange import Exchange
from multilora_client.types import AdapterChoice, Message
from multilora_client.wire import build_command, build_request

DEFAULT_MODEL = "multilora"
DEFAULT_ADMIN_MODEL = "multilora_adapters"
DEFAULT_TIMEOUT_S = 600.0
COMMAND_TIMEOUT_S = 60.0
"""How long a command that waits lets the server take until it is done."""
COMMAND_GRACE_S = 10.0
"""How much later the client gives up: the server's answer that it is not done yet says more."""
DEFAULT_RETRIES = 2
READY_TIMEOUT_S = 5.0
READY_POLL_S = 0.2
DEFAULT_URLS = {"grpc": "localhost:8001", "http": "localhost:8000"}

_SCHEMES = {"grpc": ("grpc", "grpcs"), "http": ("http", "https")}

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[\t -~]*")
"""Of what HTTP and gRPC both carry."""

Protocol: TypeAlias = Literal["grpc", "http"]


@dataclass(frozen=True)
class Settings:
    url: str | None = None
    """host:port, or a url: grpcs:// and https:// use TLS. None: Triton's usual port of the protocol on localhost."""
    protocol: Protocol = "grpc"
    model: str = DEFAULT_MODEL
    timeout: float = DEFAULT_TIMEOUT_S
    """Seconds from sending a request to its last token, retries included; math.inf for no deadline."""
    retries: int = DEFAULT_RETRIES
    """How often a request is sent again when the server is unavailable and no token has arrived."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """HTTP headers or gRPC metadata of every request, for what stands before the server or is forwarded by it."""

    admin_model: str = DEFAULT_ADMIN_MODEL
    admin_token: str = field(default="", repr=False)
    """The server's `admin_token`, if it has one; for commands alone."""

    def __post_init__(self) -> None:
        if self.protocol not in DEFAULT_URLS:
            raise ValueError(f"protocol: must be grpc or http, got {self.protocol!r}")
        if not self.timeout > 0:
            raise ValueError(f"timeout: must be above 0, got {self.timeout!r}")
        if self.retries < 0:
            raise ValueError(f"retries: must be 0 or more, got {self.retries!r}")
        for name, value in self.headers.items():
            if not (_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value)):
                raise ValueError(f"headers: {name!r} must be a header's name and have printable ASCII, got {value!r}")

        try:
            endpoint = self.endpoint
            good = endpoint.scheme in _SCHEMES[self.protocol] and endpoint.hostname and endpoint.port != 0
        except ValueError:  # from a port that is no number, or a broken IPv6 address
            good = False
        if not good:
            schemes = " or ".join(f"{scheme}://" for scheme in _SCHEMES[self.protocol])
            raise ValueError(f"url: must be host:port, or start with {schemes}; got {self.url!r}")

    @property
    def endpoint(self) -> SplitResult:
        """The url in parts, with a scheme."""
        url = self.url or DEFAULT_URLS[self.protocol]
        return urlsplit(url if "://" in url else f"{self.protocol}://{url}")

    def exchange(
        self,
        prompt: str | Sequence[Message],
        adapter: AdapterChoice | None,
        *,
        stream: bool,
        timeout: float | None,
        sampling: Mapping[str, Any],
    ) -> Exchange:
        """A request that is ready to be sent; `timeout` None is the client's.

        Over HTTP every answer is streamed, see `http_transport`.
        """
        seconds = self.timeout if timeout is None else timeout
        if not seconds > 0:
            raise ValueError(f"timeout: must be above 0, got {timeout!r}")
        stream = stream or self.protocol == "http"
        request = build_request(self.model, prompt, adapter=adapter, stream=stream, sampling=sampling)
        return Exchange(request, seconds, self.retries)

    def command(self, action: str, arguments: Mapping[str, Any]) -> Exchange:
        """A command that is ready to be sent. All are idempotent, so that they may be sent again like requests."""
        seconds = arguments.get("timeout_s", COMMAND_TIMEOUT_S)
        if not seconds > 0:
            raise ValueError(f"timeout: must be above 0, got {seconds!r}")
        request = build_command(self.admin_model, action, arguments, self.admin_token)
        return Exchange(request, seconds + COMMAND_GRACE_S, self.retries)
