# SPDX-License-Identifier: Apache-2.0
"""The `multilora-client` command."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from multilora_client import cli_adapters, errors, flags, settings
from multilora_client.aio import AsyncClient
from multilora_client.client import Client, CompletionStream
from multilora_client.table import comparison
from multilora_client.types import Chunk, Completion, Message, SamplingOptions

BASE = "base"

_EXIT_CODES: dict[type[errors.MultiloraClientError], int] = {
    errors.InvalidRequest: 3,
    errors.AdapterNotFound: 4,
    errors.NotFound: 4,
    errors.ServerUnavailable: 5,
    errors.RequestTimeout: 6,
    errors.RequestCancelled: 7,
    errors.ServerError: 8,
}
_EPILOG = """exit status:
  0  success                      5  server unavailable
  1  ready: the model is not      6  timeout
  2  wrong command line           7  cancelled by the server
  3  invalid request              8  the server failed
  4  no such adapter or model   130  interrupted; the request is cancelled
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. Errors are one line on stderr."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        sampling = flags.sampling(arguments)
        settings.Settings(**flags.client_arguments(arguments))
    except ValueError as error:
        parser.error(str(error))
    try:
        status: int = arguments.run(arguments, sampling)
        sys.stdout.flush()
        return status
    except errors.MultiloraClientError as error:
        return _report(error, arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Our reader is gone (`| head`); what Python still holds for stdout must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _generate(arguments: argparse.Namespace, sampling: SamplingOptions) -> int:
    prompt = _read_stdin() if arguments.prompt == "-" else arguments.prompt
    with _client(arguments) as client:
        if arguments.stream:
            _print_stream(client.stream(prompt, arguments.adapter, **sampling), arguments.json)
        else:
            _print_completion(client.generate(prompt, arguments.adapter, **sampling), arguments.json)
    return 0


def _chat(arguments: argparse.Namespace, sampling: SamplingOptions) -> int:
    history: list[Message] = []
    if arguments.system is not None:
        history.append({"role": "system", "content": arguments.system})
    with _client(arguments) as client:
        if arguments.message is None:
            return _converse(client, history, arguments, sampling)
        history.append({"role": "user", "content": arguments.message})
        if arguments.stream:
            _print_stream(client.chat_stream(history, arguments.adapter, **sampling), arguments.json)
        else:
            _print_completion(client.chat(history, arguments.adapter, **sampling), arguments.json)
    return 0


def _converse(client: Client, history: list[Message], arguments: argparse.Namespace, sampling: SamplingOptions) -> int:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not line.strip():
            continue
        turn: Message = {"role": "user", "content": line}
        try:
            stream = client.chat_stream([*history, turn], arguments.adapter, **sampling)
            answer = _print_stream(stream, arguments.json)
        except errors.MultiloraClientError as error:
            # The failed turn is forgotten, so that the conversation can go on.
            _report(error, arguments)
            continue
        history += [turn, {"role": "assistant", "content": answer.text}]


def _compare(arguments: argparse.Namespace, sampling: SamplingOptions) -> int:
    names: list[str] = arguments.adapters
    results = asyncio.run(_ask_all(arguments, names, sampling))
    if arguments.json:
        for name, result in zip(names, results, strict=True):
            body = {"error": result.message} if isinstance(result, Exception) else dataclasses.asdict(result)
            print(json.dumps({"name": name, **body}, ensure_ascii=False))
    else:
        print(comparison(names, results))
    failures = [result for result in results if isinstance(result, errors.MultiloraClientError)]
    return _EXIT_CODES[type(failures[0])] if failures else 0


async def _ask_all(
    arguments: argparse.Namespace, names: list[str], sampling: SamplingOptions
) -> list[Completion | errors.MultiloraClientError]:
    async with AsyncClient(**flags.client_arguments(arguments)) as client:

        async def ask(name: str) -> Completion | errors.MultiloraClientError:
            adapter = None if name == BASE else name
            try:
                # A stream, because its time to the first token can be seen.
                return await client.stream(arguments.prompt, adapter, **sampling).completion()
            except errors.MultiloraClientError as error:
                return error

        # Connects, so that no row's time to the first token has that in it.
        await client.ready()
        return await asyncio.gather(*(ask(name) for name in names))


def _ready(arguments: argparse.Namespace, sampling: SamplingOptions) -> int:
    with _client(arguments) as client:
        ready = client.ready(arguments.wait)
    print("ready" if ready else f"not ready ({_where(arguments)})")
    return 0 if ready else 1


def _print_stream(stream: CompletionStream, as_json: bool) -> Completion:
    with stream:
        for chunk in stream:
            print(_json(chunk) if as_json else chunk.text, end="\n" if as_json else "", flush=True)
        completion = stream.completion()
    print(_json(completion) if as_json else "", flush=True)
    return completion


def _print_completion(completion: Completion, as_json: bool) -> None:
    if as_json:
        print(_json(completion))
    elif len(completion.choices) == 1:
        print(completion.text)
    else:
        for index, choice in enumerate(completion.choices):
            print(f"[{index}] {choice.text}")


def _json(answer: Chunk | Completion) -> str:
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False)


def _report(error: errors.MultiloraClientError, arguments: argparse.Namespace) -> int:
    where = f" ({_where(arguments)})" if isinstance(error, errors.ServerUnavailable) else ""
    print(f"multilora-client: {' '.join(error.message.split())}{where}", file=sys.stderr)
    return _EXIT_CODES[type(error)]


def _where(arguments: argparse.Namespace) -> str:
    return f"{arguments.protocol} {arguments.url or settings.DEFAULT_URLS[arguments.protocol]}"


def _client(arguments: argparse.Namespace) -> Client:
    return Client(**flags.client_arguments(arguments))


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise errors.InvalidRequest(f"PROMPT: stdin is not valid UTF-8: {error}") from error


def _parser() -> argparse.ArgumentParser:
    common, sampled, single = flags.server(), flags.sampled(), flags.single()
    shape: dict[str, Any] = {"epilog": _EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="multilora-client", description="Ask a multilora model on a Triton server.", **shape
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text, parents=[*parents, common], **shape
        )
        made.set_defaults(run=run)
        return made

    generate = command("generate", _generate, "Complete a prompt.", single, sampled)
    generate.add_argument("prompt", metavar="PROMPT", help="the text, or - to read it from stdin")
    chat = command("chat", _chat, "Answer a message, or converse when there is none.", single, sampled)
    chat.add_argument("message", metavar="MESSAGE", nargs="?")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    compare = command("compare", _compare, "Complete one prompt with several adapters at once.", sampled)
    compare.add_argument("prompt", metavar="PROMPT")
    compare.add_argument(
        "--adapters",
        type=flags.names,
        required=True,
        metavar="A,B,base",
        help=f"{BASE} is the base model; or 'A;A:0.7,B:0.3'",
    )
    ready = command("ready", _ready, "Tell whether the model takes requests.")
    ready.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait so long for it")
    cli_adapters.add(commands, common, **shape)
    return parser


if __name__ == "__main__":
    sys.exit(main())
