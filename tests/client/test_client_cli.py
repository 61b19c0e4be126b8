# SPDX-License-Identifier: Apache-2.0
"""The command line against a fake Triton: output, exit codes, interruption."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from multilora_client.cli import main


@pytest.fixture
def cli(fake, protocol, capsys):
    """Runs a command against the fake server; returns (exit status, stdout, stderr)."""

    def run(*arguments):
        status = main([*arguments, "--protocol", protocol, "--url", fake.urls[protocol], "--timeout", "8"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_generate(cli, fake, steps):
    fake.play([steps.reply("HÉ\n", "stop", final=True)])
    options = ["--max-tokens", "5", "--temperature", "0", "--stop", "a", "--stop", "b", "--ignore-eos"]
    assert cli("generate", "hé", "--adapter", "upper", *options, "--sampling", '{"min_tokens": 2}') == (
        0,
        "HÉ\n\n",
        "",
    )
    (received,) = fake.received
    assert (received["text_input"], received["lora_name"]) == ("hé", "upper")
    assert json.loads(received["sampling_parameters"]) == {
        "max_tokens": 5,
        "temperature": 0.0,
        "stop": ["a", "b"],
        "ignore_eos": True,
        "min_tokens": 2,
    }


def test_generate_streams(cli, fake, steps):
    fake.play([steps.reply("a"), steps.reply("é", "stop", final=True)])
    assert cli("generate", "x", "--stream") == (0, "aé\n", "")
    assert fake.received[0]["stream"] is True


def test_generate_as_json(cli, fake, steps):
    fake.play([steps.reply("a"), steps.reply("é", "stop", final=True)])
    status, out, _ = cli("generate", "x", "--stream", "--json", "--adapter", "up")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line["choices"][0]["text"] for line in lines] == ["a", "é", "aé"]
    assert lines[-1]["adapter"] == "up"


def test_generate_prints_all_texts(cli, fake, steps):
    fake.play([steps.reply(["a", "b"], "stop", final=True)])
    assert cli("generate", "x", "--sampling", '{"n": 2}') == (0, "[0] a\n[1] b\n", "")


def test_generate_reads_stdin(cli, fake, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert cli("generate", "-")[0] == 0
    assert fake.received[0]["text_input"] == "from a pipe"


@pytest.mark.parametrize(
    ("code", "text", "status"),
    [
        ("INVALID_ARGUMENT", "max_tokens: must be at least 1, got -1", 3),
        ("NOT_FOUND", "LoRA up is not supported, we currently support ['rot13']", 4),
        ("UNAVAILABLE", "unavailable: the engine restarts", 5),
        ("CANCELLED", "Request was cancelled", 7),
        ("INTERNAL", "internal error:\nout of luck", 8),
    ],
)
def test_errors_are_one_line_and_an_exit_code(cli, fake, steps, code, text, status):
    fake.play([steps.fail(code, text)])
    got, out, err = cli("generate", "x", "--adapter", "up", "--retries", "0")
    assert (got, out) == (status, "")
    assert err.startswith(f"multilora-client: {' '.join(text.split())}")
    assert err.count("\n") == 1


def test_unavailable_says_where(fake, protocol, capsys):
    assert main(["generate", "x", "--url", "127.0.0.1:9", "--protocol", protocol, "--retries", "0"]) == 5
    assert f"({protocol} 127.0.0.1:9)" in capsys.readouterr().err


def test_timeout(fake, steps, protocol, capsys):
    fake.play([steps.hang])
    arguments = ["--protocol", protocol, "--url", fake.urls[protocol], "--timeout", "0.2"]
    assert main(["generate", "x", *arguments]) == 6
    assert "within 0.2 s" in capsys.readouterr().err
    fake.expect_cancelled()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate"],
        ["generate", "x", "--sampling", "{"],
        ["generate", "x", "--sampling", "[]"],
        ["generate", "x", "--timeout", "0"],
        ["generate", "x", "--retries", "-1"],
        ["generate", "x", "--url", "ftp://x"],
        ["generate", "x", "--stream", "--sampling", '{"n": 2}'],
        ["compare", "x"],
        ["compare", "x", "--adapters", " , "],
    ],
)
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_exit_codes_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "130  interrupted" in capsys.readouterr().out


def test_ready(cli, fake):
    assert cli("ready")[:2] == (0, "ready\n")
    fake.ready = False
    status, out, _ = cli("ready", "--wait", "0.1")
    assert status == 1
    assert out.startswith("not ready")


def test_compare(cli, fake, steps):
    fake.play([steps.reply("ab"), steps.reply("c\n", "stop", final=True)])
    status, out, err = cli("compare", "abc", "--adapters", "upper,base,rot13", "--max-tokens", "4")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["adapter", "upper", "base", "rot13"]
    start = lines[0].index("text")
    assert [line[start:] for line in lines[1:]] == [r"abc\n"] * 3
    assert {r.get("lora_name") for r in fake.received} == {"upper", None, "rot13"}


def test_compare_shows_errors_beside_answers(cli, fake, steps):
    fake.play([steps.fail("NOT_FOUND", "LoRA a is not supported, we currently support []")])
    status, out, _ = cli("compare", "abc", "--adapters", "a,b")
    assert status == 4
    assert out.count("LoRA a is not supported") == 2


def test_compare_as_json(cli, fake):
    status, out, _ = cli("compare", "abc", "--adapters", "a,base", "--json")
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(r["name"], r["adapter"], r["choices"][0]["text"]) for r in rows] == [
        ("a", "a", "ok"),
        ("base", None, "ok"),
    ]


def test_chat_with_one_message(cli, fake):
    assert cli("chat", "hi", "--system", "be brief", "--adapter", "upper")[:2] == (0, "ok\n")
    assert json.loads(fake.received[0]["messages"]) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]


def test_conversation_remembers_answers_and_survives_an_error(cli, fake, steps, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\nthree\n"))
    answer = steps.reply("A", "stop", final=True)
    fake.play([answer], [steps.fail("INVALID_ARGUMENT", "messages: too long")], [answer])
    status, out, err = cli("chat")
    assert (status, out) == (0, "A\nA\n")
    assert "messages: too long" in err
    assert [m["content"] for m in json.loads(fake.received[-1]["messages"])] == ["one", "A", "three"]


@pytest.mark.parametrize(
    "arguments", [["generate", "x", "--stream"], ["generate", "x"], ["compare", "x", "--adapters", "a"]]
)
def test_ctrl_c_cancels_and_exits_130(fake, steps, protocol, arguments):
    fake.play([steps.reply("begun"), steps.hang])
    options = ["--protocol", protocol, "--url", fake.urls[protocol]]
    process = subprocess.Popen(
        [sys.executable, "-m", "multilora_client.cli", *arguments, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        fake.expect_received()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "interrupted\n"
    fake.expect_cancelled()


def test_nobody_reads(fake, protocol):
    read, write = os.pipe()
    os.close(read)
    command = ["generate", "x", "--protocol", protocol, "--url", fake.urls[protocol]]
    process = subprocess.run(
        [sys.executable, "-m", "multilora_client.cli", *command],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (141, "")


def test_a_reader_that_leaves_cancels(fake, steps, protocol):
    fake.play([steps.reply("begun\n"), *[steps.reply("more " * 40000)] * 3, steps.hang])
    options = ["--protocol", protocol, "--url", fake.urls[protocol]]
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "multilora_client.cli", "generate", "x", "--stream", *options],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    try:
        assert os.read(read, 5) == b"begun"
        os.close(read)
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, err) == (141, "")
    fake.expect_cancelled()


def test_compare_with_a_sum_of_adapters(cli, fake, steps):
    fake.play([steps.reply("x", "stop", final=True)])
    assert cli("compare", "abc", "--adapters", "base; a:0.7,b:0.3")[0] == 0
    assert {r.get("lora_name") for r in fake.received} == {None, "a:0.7,b:0.3"}
