# SPDX-License-Identifier: Apache-2.0
"""`multilora`: the server in the foreground, what fits into memory, what an adapter is, and the references."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from multilora_backend import launcher
from multilora_backend.config import Config
from multilora_backend.config_reference import config_reference
from multilora_backend.errors import MultiloraError
from multilora_backend.frontend.series import reference as metrics_reference
from multilora_backend.planning.sizes import parse_size

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (MultiloraError, OSError) as error:
        print(f"multilora: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="multilora", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run tritonserver with the model until Ctrl-C", allow_abbrev=False)
    _add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--http-port", type=int, default=8000, help="0: a free one (default: %(default)s)")
    serve.add_argument("--grpc-port", type=int, default=8001, help="0: a free one (default: %(default)s)")
    serve.add_argument("--metrics-port", type=int, default=8002, help="0: a free one (default: %(default)s)")
    serve.add_argument("--instances", type=int, default=0, help="front ends (default: as config.pbtxt says)")
    serve.add_argument("--repository", type=Path, default=launcher.REPOSITORY, help="Triton model repository")
    serve.add_argument(
        "--drain", type=int, default=10, metavar="SECONDS", help="how long requests may go on after Ctrl-C"
    )
    serve.set_defaults(run=_serve)

    plan = commands.add_parser("plan", help="print what fits into memory, without loading anything", allow_abbrev=False)
    _add_model(plan)
    plan.add_argument(
        "--device-memory", type=_size, default=0, metavar="SIZE", help="of a CUDA device, as 80GiB; default: this one's"
    )
    plan.add_argument("--json", action="store_true", help="everything, for scripts")
    plan.set_defaults(run=_plan)

    look = commands.add_parser(
        "inspect", help="print what an adapter is, and whether it would load", allow_abbrev=False
    )
    look.add_argument("folder", type=Path, help="of an adapter, or one with a sub-folder for each of several")
    look.add_argument("--model", default="", help="folder of the transformers model that it is to be loaded for")
    _add_settings(look)
    look.add_argument("--json", action="store_true", help="everything, for scripts")
    look.set_defaults(run=_inspect)

    reference = commands.add_parser("config", help="print the configuration reference as a Markdown table")
    reference.set_defaults(run=lambda options: print(config_reference()) or 0)
    series = commands.add_parser("metrics", help="print the reference of the metrics as a Markdown table")
    series.set_defaults(run=lambda options: print(metrics_reference()) or 0)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", help="folder of a transformers model")
    parser.add_argument("--adapters", default="", help="folder of PEFT adapters, or a YAML or JSON file name: source")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="KEY=VALUE",
        dest="settings",
        help="a field of the configuration; see `multilora config`",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


class _Stopped(BaseException):
    """A stop signal arrived. Not an Exception: nothing between here and `_serve` may swallow it."""


def _serve(options: argparse.Namespace) -> int:
    def stop(number: int, frame: FrameType | None) -> None:
        # A second signal while the server stops would leave processes behind; the stop is bounded anyway.
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped

    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's choice stays
            signal.signal(number, stop)
    try:
        with launcher.TritonServer(
            model=options.model,
            adapters=options.adapters,
            host=options.host,
            http_port=options.http_port,
            grpc_port=options.grpc_port,
            metrics_port=options.metrics_port,
            instances=options.instances,
            settings=dict(options.settings),
            repository=options.repository,
            drain_s=options.drain,
        ) as server:
            # engine_start_timeout_s ends a load that takes too long, and a failed load ends the server.
            seconds = server.wait_ready(math.inf)
            _say(f"ready after {seconds:.1f} s: HTTP {server.http}, gRPC {server.grpc}, metrics {server.metrics}")
            code = server.wait()
            _say(f"tritonserver {launcher.describe(code)}")
            return 1
    except _Stopped:
        _say("stopped")
        return 0


def _plan(options: argparse.Namespace) -> int:
    # Imported here, since nothing else of this command needs torch.
    from rich.console import Console

    from multilora_backend.planning.plan import machine_of, make_plan
    from multilora_backend.planning.report import as_json, show

    given = {"model": options.model, "adapters": options.adapters}
    values = {**dict(options.settings), **{key: value for key, value in given.items() if value}}
    config = Config.from_mapping(values, "settings")
    plan = make_plan(config, machine_of(config, options.device_memory))
    if options.json:
        print(as_json(plan))
    else:
        show(plan, Console(soft_wrap=True, highlight=False))
    return 1 if plan.problem else 0


def _inspect(options: argparse.Namespace) -> int:
    from multilora_backend.planning import inspection_report
    from multilora_backend.planning.fit import Running, adapter_folders, inspect
    from multilora_backend.planning.plan import machine_of

    folders = adapter_folders(options.folder)
    values = {"adapters": str(folders[0].absolute().parent), **dict(options.settings)}
    config = Config.from_mapping({**values, **({"model": options.model} if options.model else {})}, "settings")
    running = Running.of(config, machine_of(config)) if config.model else None
    reports = inspect(folders, config.adapter_roots, running)
    overview, console = folders != [options.folder], inspection_report.wide_console()
    if options.json:
        print(inspection_report.as_json(reports, overview))
    elif overview:
        inspection_report.show_overview(reports, console)
    else:
        inspection_report.show(reports[0], console)
    return 1 if any(report.reasons for report in reports) else 0


def _say(text: str) -> None:
    print(f"multilora: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
