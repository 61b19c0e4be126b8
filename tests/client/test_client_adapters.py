# SPDX-License-Identifier: Apache-2.0
"""The operators' commands: both clients, both protocols and the command line against a fake Triton."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest

from multilora_client import (
    AdapterNotFound,
    AsyncClient,
    Client,
    InvalidRequest,
    NotFound,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)
from multilora_client.adapters import PAGE, Adapters, AsyncAdapters
from multilora_client.cli import main
from multilora_client.table import adapters_table

INFO = {
    "name": "é",
    "version": "ab12cd34ef5678",
    "state": "active",
    "level": "device",
    "rank": 8,
    "bytes": 3 * 2**20,
    "pinned": True,
    "aliases": ["prod"],
    "reason": "",
    "source": "s3://b/é",
    "no_effect": False,
}


@pytest.fixture
def answer(fake, steps):
    """answer(result, ...): what the fake server says to the next commands."""

    def play(*results: Any) -> None:
        texts = [result if isinstance(result, str) else json.dumps(result) for result in results]
        fake.play(*([steps.reply("", final=True, extra={"result": [text]})] for text in texts))

    return play


@pytest.fixture
def adapters(connect):
    """The `adapters` of either client, with blocking methods."""

    def make(**arguments: Any) -> Any:
        driver = connect(**arguments)
        if isinstance(driver.client, Client):
            return driver.client.adapters

        class Blocking:
            def __getattr__(self, name: str) -> Any:
                return lambda *a, **k: driver.run(getattr(driver.client.adapters, name)(*a, **k))

        return Blocking()

    return make


def sent(fake) -> dict[str, Any]:
    received = fake.received[-1]
    assert received["model"] == "multilora_adapters"
    assert set(received) == {"model", "headers", "request"}
    return json.loads(received["request"])


def test_every_command_says_what_it_was_told(adapters, fake, answer):
    client = adapters(admin_token="t")
    answer({"adapter": INFO, "done": True})
    assert client.load("é") == INFO
    assert sent(fake) == {"action": "load", "name": "é", "wait": True, "timeout_s": 60.0, "token": "t"}
    client.load("é", "s3://b", version="ab", pinned=True, tenants=("x",), wait=False, timeout=3)
    given = {"source": "s3://b", "version": "ab", "pinned": True, "tenants": ["x"], "wait": False, "timeout_s": 3}
    assert sent(fake) == {"action": "load", "name": "é", "token": "t", **given}
    for action in ("preload", "pin"):
        assert getattr(client, action)("é", timeout=5) == INFO
        assert sent(fake) == {"action": action, "name": "é", "wait": True, "timeout_s": 5, "token": "t"}
    for action in ("unpin", "show"):
        assert getattr(client, action)("é") == INFO
        assert sent(fake) == {"action": action, "name": "é", "token": "t"}
    assert client.unload("é") is None
    assert sent(fake)["action"] == "unload"
    assert client.alias("prod", "é@ab12cd") is None
    assert sent(fake) == {"action": "alias", "alias": "prod", "target": "é@ab12cd", "token": "t"}
    client.unalias("prod")
    assert sent(fake) == {"action": "unalias", "alias": "prod", "token": "t"}


def test_list_asks_for_all_pages(adapters, fake, answer):
    client = adapters()
    first, second = ([{**INFO, "name": f"a{i}"} for i in part] for part in (range(PAGE), range(PAGE, PAGE + 2)))
    answer({"adapters": first, "total": PAGE + 2}, {"adapters": second, "total": PAGE + 2})
    assert [info["name"] for info in client.list("a", "active")] == [f"a{i}" for i in range(PAGE + 2)]
    assert sent(fake) == {"action": "list", "prefix": "a", "state": "active", "offset": PAGE, "limit": PAGE}
    answer({"adapters": first, "total": PAGE + 2}, {"adapters": [], "total": PAGE})
    assert len(client.list()) == PAGE, "some were unloaded meanwhile"


def test_what_is_not_done_in_time_says_how_far_it_is(adapters, answer):
    client = adapters()
    answer({"adapter": {**INFO, "state": "loading"}, "done": False})
    with pytest.raises(RequestTimeout, match=r"^load is not done yet \(the adapter is loading\); it goes on$"):
        client.load("é", timeout=0.1)
    assert client.load("é", wait=False)["state"] == "loading"
    answer({"name": "é", "done": False})
    with pytest.raises(RequestTimeout, match=r"^unload is not done yet; it goes on$"):
        client.unload("é")


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        ("INVALID_ARGUMENT", "LoRA é is not supported, we currently support []", AdapterNotFound),
        ("INVALID_ARGUMENT", "source: /etc is not below adapter_roots", InvalidRequest),
        ("UNAVAILABLE", "unavailable: the engine of model multilora is not there; please retry", ServerUnavailable),
        ("INTERNAL", "internal: LoRA é could not be loaded: q_proj has NaN", ServerError),
    ],
)
def test_errors(adapters, fake, steps, code: str, text: str, kind: type):
    fake.play([steps.fail(code, text)])
    with pytest.raises(kind) as caught:
        adapters(retries=0).load("é")
    assert caught.value.message == text


def test_a_server_without_the_model(adapters, fake, steps):
    fake.play([steps.fail("NOT_FOUND", "Request for unknown model: 'multilora_adapters' is not found", refused=True)])
    with pytest.raises(NotFound) as caught:
        adapters().load("é")
    assert not isinstance(caught.value, AdapterNotFound)


def test_commands_are_sent_again_while_the_engine_is_away(adapters, fake, steps):
    away = [steps.fail("UNAVAILABLE", "unavailable: the engine of model multilora is not there; please retry")]
    fake.play(away, away, [steps.reply("", final=True, extra={"result": [json.dumps({"adapter": INFO})]})])
    assert adapters(retries=2).show("é") == INFO
    assert len(fake.received) == 3


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_an_answer_that_is_no_object(adapters, answer, text: str):
    answer(text)
    with pytest.raises(ServerError, match="not a JSON object"):
        adapters().show("é")


def test_the_arguments_of_the_client(fake):
    with pytest.raises(ValueError, match="timeout: must be above 0"):
        Client().adapters.load("a", timeout=0)
    client = Client(admin_token="s3cret", admin_model="other")
    assert "s3cret" not in repr(client.settings)
    assert client.settings.command("list", {}).request.model == "other"
    assert AsyncClient(admin_token="x").settings.admin_token == "x"


def test_both_clients_have_the_same_methods():
    for name, method in inspect.getmembers(Adapters, inspect.isfunction):
        if not name.startswith("_"):
            other = getattr(AsyncAdapters, name)
            assert inspect.signature(method) == inspect.signature(other), name


@pytest.fixture
def cli(fake, protocol, capsys, monkeypatch):
    monkeypatch.delenv("MULTILORA_ADMIN_TOKEN", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["adapters", *arguments, "--protocol", protocol, "--url", fake.urls[protocol], "--timeout", "8"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_command_line(cli, fake, answer):
    answer({"adapter": INFO, "done": True})
    status, out, err = cli("load", "é", "s3://b", "--pinned", "--tenants", "x, y", "--version", "ab", "--no-wait")
    assert (status, err) == (0, "")
    assert out.splitlines() == adapters_table([INFO]).splitlines()
    given = {"source": "s3://b", "version": "ab", "pinned": True, "tenants": ["x", "y"], "wait": False, "timeout_s": 8}
    assert sent(fake) == {"action": "load", "name": "é", **given}
    assert json.loads(cli("pin", "é", "--json")[1]) == INFO
    assert "3145728" in cli("show", "é")[1]
    answer({"name": "é", "done": True})
    assert cli("unload", "é")[1] == "é is unloaded\n"
    assert cli("alias", "prod", "é")[1] == "prod is é\n"
    assert json.loads(cli("unalias", "prod", "--json")[1]) == {"alias": "prod", "target": None}
    answer({"adapters": [INFO, {**INFO, "name": "x"}], "total": 2})
    assert len(cli("list", "--state", "active")[1].splitlines()) == 3
    assert sent(fake)["state"] == "active"
    assert [json.loads(line)["name"] for line in cli("list", "--json")[1].splitlines()] == ["é", "x"]


def test_the_token_comes_from_a_file_or_the_environment(cli, fake, answer, tmp_path, monkeypatch):
    answer({"adapters": [], "total": 0})
    path = tmp_path / "token"
    path.write_text("from a file\n")
    assert cli("list", "--token-file", str(path))[0] == 0
    assert sent(fake)["token"] == "from a file"
    monkeypatch.setenv("MULTILORA_ADMIN_TOKEN", "from outside")
    cli("list")
    assert sent(fake)["token"] == "from outside"
    status, _, err = cli("list", "--token-file", str(tmp_path / "nowhere"))
    assert (status, err.startswith("multilora-client: --token-file: cannot be read")) == (3, True)


def test_exit_status(cli, fake, steps, answer):
    answer({"adapter": {**INFO, "state": "loading"}, "done": False})
    assert cli("load", "é")[0] == 6
    fake.play([steps.fail("INVALID_ARGUMENT", "LoRA é is not supported, we currently support []")])
    assert cli("show", "é")[0] == 4


@pytest.mark.parametrize("result", [{}, {"adapter": 3}, {"adapters": 3, "total": 1}, {"adapters": []}])
def test_answers_of_another_kind(adapters, answer, result: dict):
    answer(result)
    with pytest.raises(ServerError, match=r"^an answer without an adapter, only"):
        adapters().show("é")
    with pytest.raises(ServerError, match=r"^an answer without a list of adapters, only"):
        adapters().list()


def test_the_table_tells_why_an_adapter_failed_and_fits_the_terminal():
    failed = {**INFO, "state": "failed", "reason": "q_proj\nhas NaN " * 9, "version": None, "pinned": False, "bytes": 0}
    header, row, other = adapters_table([failed, INFO], width=90).splitlines()
    assert header.split() == ["adapter", "version", "state", "level", "rank", "MiB", "source"]
    assert "q_proj\\nhas" in row
    assert len(row) <= 90
    assert "device, pinned" in other
    assert "ab12cd34ef56 " in other
    assert "é, prod" in other
    assert "no effect" not in other


def test_the_table_tells_that_an_adapter_has_no_effect():
    _, row = adapters_table([{**INFO, "no_effect": True}], width=200).splitlines()
    assert row.endswith(f"  has no effect; {INFO['source']}")
