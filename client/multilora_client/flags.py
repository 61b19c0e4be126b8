# SPDX-License-Identifier: Apache-2.0
"""The flags that several commands of `multilora-client` share."""

from __future__ import annotations

import argparse
import json
from typing import Any, cast

from multilora_client import settings
from multilora_client.types import SamplingOptions

_SAMPLING: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "most tokens to generate"),
    "min_tokens": (int, "fewest tokens to generate"),
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "sample from the K likeliest tokens"),
    "top_p": (float, "sample from the likeliest tokens of this much probability"),
    "min_p": (float, "drop tokens below this share of the likeliest one's probability"),
    "request_priority": (int, "larger is sooner"),
    "seed": (int, "makes sampling repeatable"),
    "logprobs": (int, "report this many of the likeliest tokens (with --json)"),
}


def server() -> argparse.ArgumentParser:
    """Where the server is, and how to talk to it."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("server")
    group.add_argument("--url", help="host:port or a url (default: localhost, 8001 for grpc, 8000 for http)")
    group.add_argument("--protocol", choices=sorted(settings.DEFAULT_URLS), default="grpc")
    group.add_argument("--model", default=settings.DEFAULT_MODEL)
    group.add_argument(
        "--timeout", type=float, default=settings.DEFAULT_TIMEOUT_S, metavar="S", help="deadline of a request"
    )
    group.add_argument(
        "--retries",
        type=int,
        default=settings.DEFAULT_RETRIES,
        help="attempts more while the server is unavailable and has sent nothing",
    )
    group.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="NAME:VALUE",
        help="HTTP header or gRPC metadata of every request; may be given again",
    )
    return parser


def sampled() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("sampling (left out: the server's defaults)")
    for name, (kind, text) in _SAMPLING.items():
        flag, metavar = f"--{name.replace('_', '-')}", "N" if kind is int else "X"
        group.add_argument(flag, type=kind, metavar=metavar, help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be given again")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on to --max-tokens")
    group.add_argument("--tenant", metavar="NAME", help="whose quota and share of the server it is")
    group.add_argument("--sampling", metavar="JSON", help="any other sampling parameters, as one object")
    parser.add_argument("--json", action="store_true", help="print results as JSON, one object a line")
    return parser


def single() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--adapter", metavar="NAME", help="adapter, or a sum like a:0.7,b:0.3 (default: the base model)"
    )
    parser.add_argument("--stream", action="store_true", help="print text as it is generated")
    return parser


def sampling(arguments: argparse.Namespace) -> SamplingOptions:
    """All sampling flags as one object; raises ValueError that names the flag."""
    try:
        given = json.loads(getattr(arguments, "sampling", None) or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--sampling: is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError("--sampling: must be a JSON object")
    for name in (*_SAMPLING, "stop", "ignore_eos", "tenant"):
        value = getattr(arguments, name, None)
        if value is not None:
            given[name] = value
    if getattr(arguments, "stream", False) and not arguments.json and given.get("n", 1) != 1:
        raise ValueError("--stream: several texts (n) cannot share one terminal: use --json, or leave out --stream")
    return cast(SamplingOptions, given)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:VALUE")
    return name.strip(), value.strip()


def names(text: str) -> list[str]:
    """Between commas, or between semicolons where there is one: sums of adapters have commas."""
    found = [name.strip() for name in text.split(";" if ";" in text else ",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("must name at least one")
    return found


def client_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a Client is made of, from the flags of `server`."""
    given = {name: getattr(arguments, name) for name in ("url", "protocol", "model", "timeout", "retries")}
    return {**given, "headers": dict(arguments.header)}
