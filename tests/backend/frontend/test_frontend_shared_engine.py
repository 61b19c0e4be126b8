# SPDX-License-Identifier: Apache-2.0
"""One engine for all front ends of a model, until the last of them is gone, however it went."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from frontend_fakes import submit, wait_until
from multilora_backend.processes import Process


def test_front_ends_that_start_together_share_one_engine(connect, engines):
    links = [connect() for _ in range(3)]
    threads = [threading.Thread(target=link.start, args=(20,)) for link in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engines.pids()) == 1
    assert len(engines.heard("Hello")) == 3
    for link in links:  # the same id in each: they must not be mixed up
        submit(link, 1)
    wait_until(lambda: all(len(link.heard.tokens(1)) == 5 for link in links))
    wait_until(lambda: all(link.heard.led for link in links))
    assert sum(link.heard.led[-1] for link in links) == 1


def test_the_engine_outlives_its_starter_and_ends_with_the_last(connect, engines):
    first, second = connect(), connect()
    first.start(20)
    second.start(20)
    first.close()
    [pid] = engines.pids()
    submit(second, 1)
    wait_until(lambda: len(second.heard.tokens(1)) == 5)
    wait_until(lambda: second.heard.led and second.heard.led[-1])
    os.kill(pid, signal.SIGKILL)  # the new leader starts the next one
    wait_until(lambda: len(engines.pids()) == 2 and second.ready)
    second.close()
    assert len(engines.heard("Bye")) == 2
    assert not any(engines.runtime.iterdir()), "the folder was left behind"


def test_an_engine_that_ignores_goodbyes_is_ended(connect, engines, monkeypatch):
    monkeypatch.setattr("multilora_backend.frontend.engine_process._EXIT_WAIT_S", 0.3)
    engines.behave(stay=True)
    link = connect()
    link.start(20)
    link.close()
    assert not Process.of(engines.pids()[0]).alive


FRONT_END = """
import os, sys, time
from multilora_backend.config import Config
from multilora_backend.frontend.service import Service
config = Config.from_json(sys.argv[1])
server = int(sys.argv[2])
service = Service(config, model="multilora", version="1", instance="other", server_pid=server, environ=os.environ)
service.start()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_front_end_takes_its_engine_with_it_but_not_from_others(connect, engines):
    def other() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", FRONT_END, engines.config().to_json(), str(os.getpid())]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    leader = other()
    link = connect()
    link.start(20)
    leader.kill()
    leader.wait()
    wait_until(lambda: link.heard.led and link.heard.led[-1])
    submit(link, 1)
    wait_until(lambda: len(link.heard.tokens(1)) == 5)
    assert len(engines.pids()) == 1
    link.close()

    alone = other()
    alone.kill()
    alone.wait()
    wait_until(lambda: not Process.of(engines.pids()[1]).alive)


@pytest.mark.parametrize(("saved", "expected"), [("/mine", "/mine"), ("", None)])
def test_the_servers_libraries_do_not_reach_the_engine(connect, engines, saved, expected):
    link = connect({"LD_LIBRARY_PATH": "/triton/libs", "MLENGINE_LD_LIBRARY_PATH": saved})
    link.start(20)
    assert engines.heard("Start")[0]["LD_LIBRARY_PATH"] == expected
