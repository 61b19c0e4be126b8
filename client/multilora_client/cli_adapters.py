# SPDX-License-Identifier: Apache-2.0
"""`multilora-client adapters ...`: the operators' commands on the command line."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from multilora_client import errors, flags, settings
from multilora_client.client import Client
from multilora_client.table import adapters_table
from multilora_client.types import AdapterInfo, SamplingOptions

TOKEN_VARIABLE = "MULTILORA_ADMIN_TOKEN"


def add(commands: Any, common: argparse.ArgumentParser, **keywords: Any) -> None:
    """Adds the command to a parser's sub-commands; `keywords` go to each parser that is made."""
    text = "List the server's adapters, and load, move, pin and unload them while it serves."
    group = commands.add_parser("adapters", help=text, description=text, **keywords)
    actions = group.add_subparsers(required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--admin-model", default=settings.DEFAULT_ADMIN_MODEL, metavar="MODEL")
    shared.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"has the operator's token (default: ${TOKEN_VARIABLE})"
    )
    shared.add_argument("--json", action="store_true", help="print what the server answers as JSON")

    def action(name: str, run: Any, text: str, *names: str, waits: bool = False) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(
            name, help=text, description=text, parents=[shared, common], **keywords
        )
        for each in names:
            made.add_argument(each.lower(), metavar=each)
        if waits:
            made.add_argument("--no-wait", dest="wait", action="store_false", help="begin it and return")
        made.set_defaults(run=_run, act=run)
        return made

    listed = action("list", _list, "List all adapters, or those in one state.")
    listed.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="only names that begin so")
    listed.add_argument("--state", help="cold, loading, active, evicting or failed")
    action("show", _show, "Tell everything about one adapter.", "NAME")
    load = action("load", _load, "Add an adapter, or replace it by what its source now holds.", "NAME", waits=True)
    load.add_argument("source", nargs="?", metavar="SOURCE", help="default: its folder among the configured adapters")
    load.add_argument("--version", metavar="HASH", help="refuse any other content")
    load.add_argument("--pinned", action="store_true", help="keep it on the device")
    load.add_argument("--tenants", type=flags.names, default=[], metavar="A,B", help="who may use it (default: all)")
    action("unload", _unload, "Remove an adapter once its requests have ended.", "NAME", waits=True)
    action("preload", _preload, "Bring an adapter to memory before it is asked for.", "NAME", waits=True)
    action("pin", _pin, "Keep an adapter on the device.", "NAME", waits=True)
    action("unpin", _unpin, "Let an adapter be evicted again.", "NAME")
    action("alias", _alias, "Let ALIAS stand for a name or name@version.", "ALIAS", "TARGET")
    action("unalias", _unalias, "Remove an alias.", "ALIAS")


def _run(arguments: argparse.Namespace, sampling: SamplingOptions) -> int:
    client = Client(
        **flags.client_arguments(arguments), admin_model=arguments.admin_model, admin_token=_token(arguments)
    )
    with client:
        arguments.act(client, arguments)
    return 0


def _token(arguments: argparse.Namespace) -> str:
    if arguments.token_file is None:
        return os.environ.get(TOKEN_VARIABLE, "")
    try:
        return str(arguments.token_file.read_text().strip())
    except (OSError, UnicodeDecodeError) as error:
        raise errors.InvalidRequest(f"--token-file: cannot be read: {error}") from error


def _waiting(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"wait": arguments.wait, "timeout": arguments.timeout}


def _list(client: Client, arguments: argparse.Namespace) -> None:
    found = client.adapters.list(arguments.prefix, arguments.state)
    if arguments.json:
        for info in found:
            print(json.dumps(info, ensure_ascii=False))
    else:
        print(adapters_table(found))


def _show(client: Client, arguments: argparse.Namespace) -> None:
    info = client.adapters.show(arguments.name)
    if arguments.json:
        print(json.dumps(info, ensure_ascii=False))
        return
    for key, value in info.items():
        print(f"{key:>15}  {json.dumps(value, ensure_ascii=False)}")


def _load(client: Client, arguments: argparse.Namespace) -> None:
    info = client.adapters.load(
        arguments.name,
        arguments.source,
        version=arguments.version,
        pinned=arguments.pinned,
        tenants=arguments.tenants,
        **_waiting(arguments),
    )
    _print(info, arguments)


def _unload(client: Client, arguments: argparse.Namespace) -> None:
    client.adapters.unload(arguments.name, **_waiting(arguments))
    _say({"name": arguments.name}, f"{arguments.name} is unloaded" if arguments.wait else "begun", arguments)


def _preload(client: Client, arguments: argparse.Namespace) -> None:
    _print(client.adapters.preload(arguments.name, **_waiting(arguments)), arguments)


def _pin(client: Client, arguments: argparse.Namespace) -> None:
    _print(client.adapters.pin(arguments.name, **_waiting(arguments)), arguments)


def _unpin(client: Client, arguments: argparse.Namespace) -> None:
    _print(client.adapters.unpin(arguments.name), arguments)


def _alias(client: Client, arguments: argparse.Namespace) -> None:
    client.adapters.alias(arguments.alias, arguments.target)
    moved = {"alias": arguments.alias, "target": arguments.target}
    _say(moved, f"{arguments.alias} is {arguments.target}", arguments)


def _unalias(client: Client, arguments: argparse.Namespace) -> None:
    client.adapters.unalias(arguments.alias)
    _say({"alias": arguments.alias, "target": None}, f"{arguments.alias} is no alias", arguments)


def _print(info: AdapterInfo, arguments: argparse.Namespace) -> None:
    print(json.dumps(info, ensure_ascii=False) if arguments.json else adapters_table([info]))


def _say(result: dict[str, Any], text: str, arguments: argparse.Namespace) -> None:
    print(json.dumps(result, ensure_ascii=False) if arguments.json else text)
