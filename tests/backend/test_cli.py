# SPDX-License-Identifier: Apache-2.0
"""`multilora` as a user types it: signals, exit codes and messages."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest

from multilora_backend import cli, launcher
from multilora_backend.config import Config
from multilora_backend.errors import ErrorCode, MultiloraError

REPOSITORY = Path(__file__).parent / "stand_in_repository"
FREE_PORTS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]


def marked(token: str) -> list[int]:
    """Processes whose environment has the token."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and token.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def test_serve_waits_for_as_long_as_the_engine_may_take(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    class Slow(launcher.TritonServer):
        """Compiles kernels for an hour; then it ends."""

        http = grpc = metrics = "127.0.0.1:0"

        def __init__(self, **options) -> None:
            assert options["settings"] == {"engine_start_timeout_s": "7200"}

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def wait_ready(self, timeout: float = 600.0) -> float:
            if timeout < 3600:
                raise MultiloraError(ErrorCode.UNAVAILABLE, f"not ready after {timeout:g} s")
            return 3600.0

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(launcher, "TritonServer", Slow)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest's own stay
    assert cli.main(["serve", "--set", "engine_start_timeout_s=7200"]) == 1
    assert "ready after 3600.0 s" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 3)])
def test_serve_answers_until_a_signal_and_leaves_nothing(number: signal.Signals, times: int) -> None:
    token = uuid.uuid4().hex
    command = [sys.executable, "-m", "multilora_backend.cli", "serve", "--repository", str(REPOSITORY), *FREE_PORTS]
    environment = {**os.environ, "TEST_TOKEN": token}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if ready := re.search(r"multilora: ready after [\d.]+ s: HTTP (\S+), gRPC \S+, metrics \S+", line):
                break
        assert ready
        with urllib.request.urlopen(f"http://{ready[1]}/v2/health/ready", timeout=10) as answer:
            assert answer.status == 200
        assert len(marked(token)) == 4  # the command, the server, its stub and the stand-in's engine
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.1)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    assert rest.endswith("multilora: stopped\n")
    assert marked(token) == []


@pytest.mark.e2e
def test_serve_says_why_the_server_ended(capfd: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["serve", "--repository", str(REPOSITORY), *FREE_PORTS, "--set", "log_level=error"])
    assert status == 1
    output = capfd.readouterr().err
    assert "the stand-in was told to fail" in output
    assert output.endswith("multilora: tritonserver ended with status 1 before it was ready; see its log\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such"], "multilora: model: /no/such does not exist"),
        (["--set", "nonsense=1"], "multilora: settings: unknown key 'nonsense'"),
        (["--repository", "/no/such", "--instances", "2"], "/no/such"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *FREE_PORTS, *arguments]) == 1
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1


def test_set_wants_key_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--set", "max_loras"])
    assert exit_.value.code == 2
    assert "'max_loras' is not KEY=VALUE" in capsys.readouterr().err


def test_the_reference_has_every_field_with_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == 5
    assert [re.match(r"\| `(\w+)` \|", row)[1] for row in rows] == [  # type: ignore[index]
        field.name for field in dataclasses.fields(Config)
    ]
    by_name = {row.split("`")[1]: row for row in rows}
    assert by_name["block_size"] == "| `block_size` | int | `16` | Tokens in a KV page. |"
    assert "| `auto`, `cpu`, `cuda` | `auto` |" in by_name["device"]
    assert "| bool | `true` |" in by_name["report_custom_metrics"]
    assert "| str | empty | Folder of a transformers model" in by_name["model"]
