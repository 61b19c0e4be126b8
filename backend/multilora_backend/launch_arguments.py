# SPDX-License-Identifier: Apache-2.0
"""What a launch is given, checked and made concrete before any process starts."""

from __future__ import annotations

import contextlib
import random
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from multilora_backend.config import ENV_PREFIX, Config
from multilora_backend.errors import invalid

MODEL_NAME = "multilora"
ADMIN_MODEL_NAME = "multilora_adapters"
KERNEL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_FREE_PORT, TRIES = 20_000, 20


def environment(model: str | Path, adapters: str | Path, settings: Mapping[str, object]) -> dict[str, str]:
    """The configuration as MULTILORA_* variables, refused here if it is wrong: the server takes seconds to say so."""
    values = dict(settings)
    for name, path in (("model", model), ("adapters", adapters)):
        if path:
            if not Path(path).exists():
                raise invalid(name, f"{path} does not exist")
            values[name] = Path(path).resolve()
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}
    Config.from_mapping(texts, "settings")
    return {f"{ENV_PREFIX}{name.upper()}": text for name, text in texts.items()}


def address(host: str) -> str:
    """Triton binds names other than it says, so it is given the address."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise invalid("host", f"{host!r} is not an address of this machine: {error}") from error


def ports(host: str, asked: Mapping[str, int]) -> dict[str, int]:
    """Replaces 0 by free ports and refuses ports in use: another server there would answer in our server's place.

    All are held at once, so that they differ; they are free, not reserved, afterwards.
    """
    chosen = {}
    with contextlib.ExitStack() as held:
        # The asked ones first: a free one must not take their place.
        for kind, port in sorted(asked.items(), key=lambda item: -item[1]):
            if not 0 <= port < 65536:
                raise invalid(f"{kind}_port", f"must be 0 to 65535, got {port}")
            try:
                holder = held.enter_context(_listening(host, port) if port else _listening_anywhere(host))
            except OSError as error:
                raise invalid(f"{kind}_port", f"cannot listen on {host}:{port}: {error.strerror}") from error
            chosen[kind] = holder.getsockname()[1]
    return chosen


def _listening_anywhere(host: str) -> socket.socket:
    """Below the kernel's range if there is room; else the kernel chooses.

    The server listens seconds later, and meanwhile whoever asks the kernel for a port, if only to connect from, might
    be given this one and answer in the server's place.
    """
    try:
        end = int(KERNEL_PORTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):  # no Linux, or not as it writes them
        end = 0
    below = range(FIRST_FREE_PORT, end)
    for port in random.SystemRandom().sample(below, min(TRIES, len(below))):
        with contextlib.suppress(OSError):  # somebody has it
            return _listening(host, port)
    return _listening(host, 0)


def _listening(host: str, port: int) -> socket.socket:
    holder = socket.socket()
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection in TIME_WAIT is no hindrance
        holder.bind((host, port))
        holder.listen(1)  # with SO_REUSEADDR only a listening socket keeps others off the port
    except OSError:
        holder.close()
        raise
    return holder


def models(repository: Path) -> list[str]:
    """What to load of a repository: the model and, where there is one, the model that administers its adapters."""
    there = (repository / ADMIN_MODEL_NAME / "config.pbtxt").exists()
    return [MODEL_NAME, ADMIN_MODEL_NAME] if there else [MODEL_NAME]


def header_flags(variables: Mapping[str, str]) -> list[str]:
    """tritonserver's flags that forward the headers which the configuration names, and no others."""
    names = [variables.get(f"{ENV_PREFIX}{field}", "") for field in ("TENANT_HEADER", "PRIORITY_HEADER")]
    if not any(names):
        return []
    pattern = f"(?i)^({'|'.join(re.escape(name) for name in names if name)})$"
    return [f"--{protocol}-header-forward-pattern={pattern}" for protocol in ("http", "grpc")]


def with_instances(source: Path, target: Path, instances: int) -> Path:
    """A repository like `source` whose multilora model has another number of front ends."""
    if instances < 1:
        raise invalid("instances", f"must be at least 1, got {instances}")
    model = target / MODEL_NAME
    model.mkdir(parents=True)
    for other in models(source)[1:]:
        (target / other).symlink_to(source.resolve() / other)
    for entry in (source.resolve() / MODEL_NAME).iterdir():
        if entry.name != "config.pbtxt":
            (model / entry.name).symlink_to(entry)
    text = (source / MODEL_NAME / "config.pbtxt").read_text()
    group = re.compile(r"(instance_group\s*:?\s*\[\s*\{[^}]*?\bcount\s*:\s*)\d+")
    text, found = group.subn(rf"\g<1>{instances}", text)
    if found != 1:
        raise invalid("instances", f"{source / MODEL_NAME / 'config.pbtxt'} must have one instance_group with a count")
    (model / "config.pbtxt").write_text(text)
    return target
