# SPDX-License-Identifier: Apache-2.0
"""Commands to the engine in virtual time: what is answered at once, what waits, and that no error gets further."""

from __future__ import annotations

from typing import Any

import pytest

from administration_bench import Bench
from multilora_backend.engine import administration
from multilora_backend.engine.administration import POLL_S
from multilora_backend.errors import ErrorCode
from multilora_backend.protocol import AdapterInfo


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(("action", "loads"), [("load", ["load", "preload"]), ("preload", ["preload"])])
def test_loading_waits_until_the_weights_have_been_read(bench: Bench, action: str, loads: list[str]):
    bench.adapters.set("a")
    bench.do(action, name="a")
    assert [call[0] for call in bench.adapters.calls] == loads
    for fields in ({"state": "loading"}, {"state": "loading", "level": "host"}):
        bench.adapters.set("a", **fields)
        bench.poll()
        assert bench.answers() == []
        assert bench.administration.waits
    bench.adapters.set("a", state="cold", level="host")  # the device has no room
    bench.poll()
    [result] = bench.answers()
    assert (result["done"], result["adapter"]["level"], result["adapter"]["name"]) == (True, "host", "a")
    assert not bench.administration.waits
    bench.poll()
    assert bench.answers() == []


def test_what_is_pinned_waits_for_the_device(bench: Bench):
    bench.adapters.set("a", level="host", pinned=True)
    bench.do("pin", name="a")
    bench.poll()
    assert bench.answers() == []
    bench.adapters.set("a", level="device", state="active", pinned=True)
    bench.poll()
    assert bench.answers()[0]["done"]


def test_all_that_load_is_told_reaches_the_manager(bench: Bench):
    bench.do("load", name="a", source="s3://x", version="ab12", pinned=True, tenants=("t",), wait=False)
    given = {"version": "ab12", "pinned": True, "tenants": ("t",)}
    assert bench.adapters.calls[0] == ("load", "a", "s3://x", given)
    [result] = bench.answers()
    assert (result["done"], result["adapter"]["state"]) == (False, "cold")


def test_a_load_that_fails_is_an_error_with_the_reason(bench: Bench):
    bench.do("load", name="a", frontend="g")
    bench.adapters.set("a", state="failed", reason="q_proj has NaN")
    bench.poll()
    assert bench.sent[0][0] == "g"
    assert bench.answers() == [(ErrorCode.INTERNAL, "LoRA a could not be loaded: q_proj has NaN")]


def test_a_new_revision_that_is_refused_is_an_error_though_the_old_one_serves(bench: Bench):
    bench.adapters.set("a", state="active", level="device")
    bench.do("load", name="a")
    bench.adapters.set("a", pending=True, reason="an older note")
    bench.poll()
    assert bench.answers() == [], "the old one is on the device, but it is the new one that is waited for"
    bench.adapters.set("a", pending=False, reason="a new revision from /x was refused: q_proj has NaN")
    bench.poll()
    reason = "LoRA a: a new revision from /x was refused: q_proj has NaN"
    assert bench.answers() == [(ErrorCode.INTERNAL, reason)]


def test_what_is_on_the_host_may_yet_go_to_the_device(bench: Bench):
    bench.adapters.set("a", level="host")
    bench.do("preload", name="a")
    assert bench.answers() == [], "the manager has not looked yet"
    bench.adapters.set("a", state="active", level="device")
    bench.poll(0)
    assert bench.answers()[0]["adapter"]["level"] == "device"


def test_unload_waits_until_nobody_uses_it(bench: Bench):
    bench.adapters.set("a")
    bench.adapters.drains = {"a"}
    bench.do("unload", name="a")
    bench.do("unload", name="a", wait=False)
    assert bench.answers() == [{"name": "a", "done": False}]
    bench.poll()
    assert bench.answers() == []
    bench.adapters.drains = set()
    bench.poll()
    assert bench.answers() == [{"name": "a", "done": True}]
    bench.do("unload", name="a")
    bench.poll(0)
    assert bench.answers() == [{"name": "a", "done": True}], "again: it is gone already"


def test_after_its_timeout_a_command_is_answered_as_it_stands(bench: Bench):
    bench.adapters.set("a", state="loading")
    bench.do("preload", name="a", timeout_s=2.0)
    bench.do("preload", name="a", timeout_s=9.0)
    bench.poll(1.9)
    assert bench.answers() == []
    bench.poll(0.2)
    [result] = bench.answers()
    assert (result["done"], result["adapter"]["state"]) == (False, "loading")
    assert bench.administration.waits, "the other one still does"


def test_waiting_commands_are_looked_at_now_and_then(bench: Bench):
    bench.adapters.set("a", state="loading")
    bench.do("preload", name="a")
    bench.poll()
    bench.adapters.set("a", state="active", level="device")
    bench.poll(POLL_S / 4)
    assert bench.answers() == []
    bench.poll(POLL_S)
    assert len(bench.answers()) == 1


def test_showing_is_answered_at_once(bench: Bench):
    bench.adapters.set("a", pinned=True)
    bench.adapters.written = False
    bench.do("show", name="a")
    bench.do("list")
    shown, listed = bench.answers()
    assert shown["adapter"]["name"] == listed["adapters"][0]["name"] == "a"


def test_what_changes_something_is_done_when_a_restart_would_know_it(bench: Bench):
    bench.adapters.set("a", level="device", state="active")
    bench.adapters.written = False
    commands = [
        ("alias", {"alias": "b", "target": "a"}),
        ("unalias", {"alias": "b"}),
        ("unpin", {"name": "a"}),
        ("pin", {"name": "a"}),
        ("load", {"name": "a"}),
        ("unload", {"name": "c"}),
    ]
    for action, arguments in commands:
        bench.do(action, **arguments)
    bench.poll()
    assert bench.answers() == []
    bench.adapters.written = True
    bench.poll()
    moved, removed, unpinned, pinned, loaded, unloaded = bench.answers()
    assert (moved, removed) == (
        {"alias": "b", "target": "a", "done": True},
        {"alias": "b", "target": None, "done": True},
    )
    assert all(result["adapter"]["name"] == "a" and result["done"] for result in (unpinned, pinned, loaded))
    assert unloaded == {"name": "c", "done": True}
    assert bench.adapters.calls[:4] == [("alias", "b", "a"), ("unalias", "b"), ("unpin", "a"), ("pin", "a")]


def test_lists_come_in_pages_and_by_prefix_and_state(bench: Bench):
    for number in range(7):
        bench.adapters.set(f"a{number}", state="failed" if number % 2 else "cold")
    bench.adapters.set("b")

    def names(**arguments: Any) -> tuple[list[str], int]:
        bench.do("list", **arguments)
        [result] = bench.answers()
        return [info["name"] for info in result["adapters"]], result["total"]

    assert names(prefix="a", limit=3) == (["a0", "a1", "a2"], 7)
    assert names(prefix="a", offset=6, limit=3) == (["a6"], 7)
    assert names(state="failed", offset=1) == (["a3", "a5"], 3)
    assert names(prefix="c") == ([], 0)


@pytest.mark.parametrize("sent", ["", "wrong", "secre", "secret ", "é"])
def test_a_wrong_token_changes_nothing(sent: str):
    bench = Bench(token="secret")
    bench.do("unload", name="a", token=sent)
    assert bench.answers() == [(ErrorCode.INVALID_ARG, "token: is missing or is not this server's admin_token")]
    assert bench.adapters.calls == []
    bench.do("unload", name="a", token="secret")
    bench.poll(0)
    assert bench.answers() == [{"name": "a", "done": True}]


def test_a_command_that_breaks_is_an_error_and_nothing_else(bench: Bench):
    def broken(name: str) -> AdapterInfo:
        raise ZeroDivisionError("a bug")

    bench.adapters.set("a", state="loading")
    bench.do("preload", name="a")
    bench.adapters.show = broken  # type: ignore[method-assign]
    bench.do("show", name="a")
    bench.poll()
    assert bench.answers() == [
        (ErrorCode.INTERNAL, "show failed: ZeroDivisionError: a bug"),
        (ErrorCode.INTERNAL, "preload failed: ZeroDivisionError: a bug"),
    ]
    bench.do("reload", name="a")
    [(code, message)] = bench.answers()
    assert (code, message) == (ErrorCode.INVALID_ARG, "action: is not known: 'reload'")


def test_too_many_that_wait_are_refused_before_anything_is_done(bench: Bench, monkeypatch):
    monkeypatch.setattr(administration, "MAX_WAITING", 1)
    bench.adapters.set("a", state="loading")
    bench.do("preload", name="a")
    bench.do("load", name="b")
    [(code, _)] = bench.answers()
    assert code is ErrorCode.UNAVAILABLE
    assert "b" not in bench.adapters.infos
    bench.do("show", name="a")
    bench.do("preload", name="a", wait=False)
    assert [result["adapter"]["name"] for result in bench.answers()] == ["a", "a"]


def test_a_front_end_that_left_is_not_answered(bench: Bench):
    bench.adapters.set("a", state="loading")
    bench.do("preload", name="a", frontend="gone")
    bench.do("preload", name="a", frontend="here")
    bench.administration.drop_frontend("gone")
    bench.adapters.set("a", state="active", level="device")
    bench.poll()
    assert [frontend for frontend, _ in bench.sent] == ["here"]
