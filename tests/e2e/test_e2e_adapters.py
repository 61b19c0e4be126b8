# SPDX-License-Identifier: Apache-2.0
"""Adapters are added, moved, replaced and removed while requests run: every answer is exactly some adapter's."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from adapter_traffic import Traffic
from extras_models import ResizingJudge, save_trained
from multilora_backend.launcher import TritonServer
from multilora_client import AdapterNotFound, Client, InvalidRequest, RequestTimeout, ServerError
from tiny.tasks import BASE, TASKS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples/tiny/adapters"
TOKEN = "only-for-operators"
GREEDY = {"temperature": 0.0, "max_tokens": 32}
ENDLESS = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}
CONFIGURED = ("upper", "rot13")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configured, watched folder; a store beside it holds what operators may load."""
    folder = tmp_path_factory.mktemp("watched")
    for name in CONFIGURED:
        shutil.copytree(EXAMPLES / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def operated(launch: Callable[..., TritonServer], folder: Path) -> TritonServer:
    settings = {"adapter_roots": EXAMPLES, "adapters_watch_s": 0.2, "admin_token": TOKEN}
    return launch(adapters=folder, settings=settings)


@pytest.fixture
def client(operated: TritonServer) -> Iterator[Client]:
    with Client(operated.grpc, admin_token=TOKEN) as client:
        yield client


def ask(client: Client, adapter: str | None, word: str = "hello") -> str:
    return client.generate(word, adapter, **GREEDY).text


@contextmanager
def traffic(server: TritonServer, *names: str) -> Iterator[Traffic]:
    """Requests for the names, again and again, each name in a thread of its own; stopped and checked at the end."""
    with Traffic(server.grpc, [None if name == BASE else name for name in names]) as running:
        running.wait_for_more(1)
        yield running
        running.wait_for_more(2)


def eventually(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def test_an_adapter_is_added_and_removed_under_traffic(operated, client, metrics):
    with pytest.raises(AdapterNotFound):
        ask(client, "sort")
    with traffic(operated, BASE, *CONFIGURED) as running:
        info = client.adapters.load("sort", str(EXAMPLES / "sort"))
        assert (info["name"], info["origin"], info["state"]) == ("sort", "admin", "active")
        assert ask(client, "sort") == TASKS["sort"]("hello")
        assert client.adapters.load("sort", str(EXAMPLES / "sort"))["version"] == info["version"], "idempotent"
        assert ask(client, f"sort@{info['version'][:8]}") == TASKS["sort"]("hello")
        client.adapters.unload("sort")
        with pytest.raises(AdapterNotFound):
            ask(client, "sort")
        client.adapters.unload("sort")
    assert running.wrong({BASE: {BASE}, **{name: {name} for name in CONFIGURED}}) == []


def test_an_alias_moves_at_once_and_no_answer_is_a_mixture(operated, client):
    client.adapters.alias("prod", "upper")
    with traffic(operated, "prod", "prod", "prod") as running:
        running.wait_for_more(5)
        client.adapters.alias("prod", "rot13")
        moved = time.monotonic()
        running.wait_for_more(5)
    assert running.wrong({"prod": {"upper", "rot13"}}) == []
    assert running.wrong({"prod": {"rot13"}}, since=moved) == []
    assert client.adapters.show("prod")["name"] == "rot13"
    with pytest.raises(InvalidRequest, match="leads back"):
        client.adapters.alias("prod", "prod")
    client.adapters.unalias("prod")
    with pytest.raises(AdapterNotFound):
        ask(client, "prod")


def test_a_replaced_adapter_answers_wholly_as_the_old_or_the_new(operated, client):
    old = client.adapters.load("job", str(EXAMPLES / "reverse"))
    with traffic(operated, "job", "job", BASE) as running:
        new = client.adapters.load("job", str(EXAMPLES / "double"))
        replaced = time.monotonic()
        assert new["version"] != old["version"]
        assert ask(client, "job") == TASKS["double"]("hello")
        running.wait_for_more(5)
    assert running.wrong({"job": {"reverse", "double"}, BASE: {BASE}}) == []
    assert running.wrong({"job": {"double"}}, since=replaced) == []
    client.adapters.unload("job")


def test_an_adapter_brings_tokens_of_its_own(operated, client, folder, tmp_path):
    """Its first request, cut before anybody knows of them, later ones, and a token that it alone may name."""
    model = ROOT / "examples/tiny/model"
    save_trained(model, tmp_path / "tagged", 3, 262, modules_to_save=["embed_tokens", "lm_head"], r=4)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["[tool]", "[call]"])
    tokenizer.save_pretrained(tmp_path / "tagged")
    prompt, judge = "hi[tool][call] you[tool]", ResizingJudge(model, tmp_path, "cpu")
    ids = tokenizer(prompt).input_ids
    assert len(ids) == 11, "2 and 6 letters, 3 tokens more"
    tokens = list(ids)
    for _ in range(8):
        tokens.append(int(judge.logits("tagged", tokens)[-1].argmax()))
    expected = tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True)
    options = {"max_tokens": 8, "ignore_eos": True, "logprobs": 0}
    with traffic(operated, BASE, *CONFIGURED) as running:
        shutil.copytree(tmp_path / "tagged", folder / ".tagged")
        (folder / ".tagged").rename(folder / "tagged")
        eventually(lambda: [info["name"] for info in client.adapters.list(prefix="tagged")] == ["tagged"])
        for _ in range(2):
            answer = client.generate(prompt, "tagged", temperature=0.0, **options)
            assert (answer.num_input_tokens, answer.text) == (len(ids), expected)
        said = client.generate(prompt, "tagged", temperature=0.0, max_tokens=3, logit_bias={261: 100.0})
        assert said.text == "[call]" * 3
        with pytest.raises(InvalidRequest, match="logit_bias: token ids must be below the vocabulary's 260"):
            client.generate(prompt, "upper", logit_bias={261: 100.0})
    assert running.wrong({BASE: {BASE}, **{name: {name} for name in CONFIGURED}}) == []


@pytest.fixture(scope="module")
def endless_reverse(operated: TritonServer) -> str:
    """What `reverse` goes on to say after its answer, alone."""
    with Client(operated.grpc, admin_token=TOKEN) as client:
        client.adapters.load("endless", str(EXAMPLES / "reverse"))
        text = client.generate("hello", "endless", **ENDLESS).text
        client.adapters.unload("endless")
        return text


@pytest.mark.parametrize("change", ["replace", "unload", "move"])
def test_a_request_in_flight_ends_on_what_it_began_with(client, endless_reverse: str, change: str):
    """A long one, whose text is known from before: not one of its tokens may be another adapter's."""
    client.adapters.load("job", str(EXAMPLES / "reverse"))
    client.adapters.alias("way", "job")
    stream = client.stream("hello", "way", **ENDLESS)
    first = next(stream)
    if change == "replace":
        info = client.adapters.load("job", str(EXAMPLES / "upper"))
        assert info["versions"], "the old version is not held any more: nothing is shown"
    elif change == "move":
        client.adapters.alias("way", "upper")
        assert client.adapters.show("job")["holds"] == 1
    else:
        client.adapters.unalias("way")
        with pytest.raises(RequestTimeout, match="unload is not done yet"):
            client.adapters.unload("job", timeout=0.01)
    begun_after = _said(client, "way")
    assert not first.final
    assert stream.completion().text == endless_reverse
    assert begun_after == (None if change == "unload" else "HELLO")
    client.adapters.unalias("way")
    client.adapters.unload("job")
    with pytest.raises(AdapterNotFound):
        client.adapters.show("job")


def test_an_adapter_of_one_tenant_is_nobody_elses(client):
    client.adapters.load("own", str(EXAMPLES / "sort"), tenants=["acme-*"])
    assert client.generate("hello", "own", tenant="acme-1", **GREEDY).text == TASKS["sort"]("hello")
    for other in ({"tenant": "rival"}, {}):
        with pytest.raises(InvalidRequest, match="LoRA own is not for"):
            client.generate("hello", "own", **other, **GREEDY)
    client.adapters.unload("own")


def test_the_watched_folder_is_followed_while_serving(operated, client, folder):
    with traffic(operated, BASE, "upper") as running:
        shutil.copytree(EXAMPLES / "devowel", folder / ".incoming")
        (folder / ".incoming").rename(folder / "extra")
        eventually(lambda: "extra" in {info["name"] for info in client.adapters.list("extra")})
        assert ask(client, "extra") == TASKS["devowel"]("hello")
        assert client.adapters.show("extra")["origin"] == "config"

        shutil.copytree(EXAMPLES / "reverse", folder / ".incoming")
        shutil.rmtree(folder / "extra")
        (folder / ".incoming").rename(folder / "extra")
        eventually(lambda: _said(client, "extra") == TASKS["reverse"]("hello"))

        shutil.rmtree(folder / "extra")
        eventually(lambda: _said(client, "extra") is None)
    assert running.wrong({BASE: {BASE}, "upper": {"upper"}}) == []


def _said(client: Client, name: str) -> str | None:
    """The answer of an adapter; None if there is none of that name."""
    try:
        return ask(client, name)
    except (AdapterNotFound, ServerError):
        return None


def test_what_is_pinned_stays_on_the_device(client):
    client.adapters.pin("upper")
    info = client.adapters.show("upper")
    assert (info["pinned"], info["level"]) == (True, "device")
    assert not client.adapters.unpin("upper")["pinned"]


@pytest.mark.parametrize("source", ["/etc", f"{EXAMPLES}/../model", "s3://bucket/x", "hf:org/repo", "../x"])
def test_sources_outside_of_the_roots_are_refused(client, source: str):
    with pytest.raises(InvalidRequest) as caught:
        client.adapters.load("x", source)
    assert caught.value.message.startswith("source: ")
    with pytest.raises(AdapterNotFound):
        client.adapters.show("x")


def test_only_who_has_the_token_commands(operated):
    for token in ("", "only-for-operator"):
        with Client(operated.grpc, admin_token=token) as stranger:
            for command in (stranger.adapters.list, lambda: stranger.adapters.unload("upper")):
                with pytest.raises(InvalidRequest, match=r"^token: is missing or is not this server's admin_token"):
                    command()
            assert ask(stranger, "upper") == "HELLO"


def test_a_load_that_fails_says_why_and_hurts_nobody(operated, client, folder):
    (folder / "broken").mkdir()
    with traffic(operated, BASE, "upper") as running:
        with pytest.raises(ServerError, match=r"LoRA broken could not be loaded: .*adapter_config\.json"):
            client.adapters.load("broken")
        (folder / "broken").rmdir()
    assert running.wrong({BASE: {BASE}, "upper": {"upper"}}) == []


def test_the_catalogue_survives_the_engine(operated, client):
    client.adapters.load("kept", str(EXAMPLES / "sort"))
    client.adapters.alias("latest", "kept")
    pids = [pid for pid in operated.processes() if b"multilora_backend.engine" in _command(pid)]
    os.kill(pids[0], signal.SIGKILL)
    with Client(operated.grpc, admin_token=TOKEN, retries=50) as patient:
        assert patient.adapters.show("latest")["name"] == "kept"
        assert ask(patient, "latest") == TASKS["sort"]("hello")
        patient.adapters.unalias("latest")
        patient.adapters.unload("kept")


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
