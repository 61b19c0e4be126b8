# SPDX-License-Identifier: Apache-2.0
"""Starts tritonserver with our model, waits until it answers, and ends it with everything that it started.

Every process of a server carries a mark in its environment, so that the stubs and the engine are found by it even
after their parents are gone; it is also how shared memory that a killed server leaves behind is told from others'.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from multilora_backend import launch_arguments, tritonserver
from multilora_backend.config import ENV_PREFIX
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.launch_arguments import MODEL_NAME

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
MARK = "MLENGINE_LAUNCH"
"""Not MULTILORA_*: those are configuration, and unknown ones are refused."""
RUNTIME_DIR = f"{ENV_PREFIX}RUNTIME_DIR"
_POLL_S = 0.05
_LEAVE_S = 5.0
"""How long stubs and engine may outlive a server that has stopped."""
_KILL_WAIT_S = 10.0
_TAIL_BYTES = 6000
_STACK_BYTES = 256 * 2**20


class TritonServer:
    """A running tritonserver with the multilora model; a context manager that leaves nothing behind.

    `http`, `grpc` and `metrics` are `host:port` as tritonclient wants them, reachable from this machine.
    """

    def __init__(
        self,
        *,
        model: str | Path = "",
        adapters: str | Path = "",
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        instances: int = 0,
        settings: Mapping[str, object] | None = None,
        log: Path | None = None,
        repository: Path = REPOSITORY,
        drain_s: int = 10,
    ) -> None:
        """Starts the server and returns at once.

        A port of 0 becomes a free one. `instances` is the number of front ends, 0 leaves config.pbtxt's. `settings`
        are further fields of Config. `log` takes the server's output; without one it goes where this process writes.
        `drain_s` is how long requests in flight may go on after `stop`.
        Raises MultiloraError for a bad setting or folder and when there is no tritonserver.
        """
        installation = tritonserver.find(os.environ)
        variables = launch_arguments.environment(model, adapters, settings or {})
        host = launch_arguments.address(host)
        chosen = launch_arguments.ports(host, {"http": http_port, "grpc": grpc_port, "metrics": metrics_port})
        near = "127.0.0.1" if host == "0.0.0.0" else host
        self.http, self.grpc, self.metrics = (f"{near}:{chosen[kind]}" for kind in ("http", "grpc", "metrics"))
        self.log = log
        self._drain_s = drain_s
        self._mark = uuid.uuid4().hex
        self._scratch = Path(tempfile.mkdtemp(prefix="multilora-"))
        try:
            if instances:
                repository = launch_arguments.with_instances(repository, self._scratch / "repository", instances)
            command = [
                *_large_stack(),
                *_with_parent(),
                str(installation.binary),
                f"--model-repository={repository.resolve()}",
                "--model-control-mode=explicit",
                *(f"--load-model={name}" for name in launch_arguments.models(repository)),
                f"--backend-config=python,shm-region-prefix-name={self._memory_prefix}",
                f"--exit-timeout-secs={drain_s}",
                *installation.flags(),
                *launch_arguments.header_flags({**os.environ, **variables}),
            ]
            for kind, port in chosen.items():
                command += [f"--{kind}-address={host}", f"--{kind}-port={port}"]
            environment = installation.environment(os.environ)
            # The engine's socket lies where a killed server's leftovers are removed as well.
            environment.setdefault(RUNTIME_DIR, str(self._scratch))
            environment.update(variables)
            environment[MARK] = self._mark
            with open(log, "ab") if log else open(os.dup(2), "wb") as output:
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # A session of its own: Ctrl-C in the terminal reaches this process alone, which then stops
                    # the server in order.
                    start_new_session=True,
                )
        except BaseException:  # also Ctrl-C: the scratch folder must go
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def _memory_prefix(self) -> str:
        return f"multilora-{self._mark[:12]}-"

    def wait_ready(self, timeout: float = 600.0) -> float:
        """Waits until the model answers; returns the seconds it took.

        Raises MultiloraError(UNAVAILABLE), with the end of the log, as soon as the server has ended or after `timeout`.
        """
        started = time.monotonic()
        url = f"http://{self.http}/v2/models/{MODEL_NAME}/ready"
        # A proxy from the environment must not stand between us and our own server.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            if (code := self.poll()) is not None:
                raise self._failure(f"tritonserver {describe(code)} before it was ready")
            try:
                with opener.open(url, timeout=2.0):
                    return time.monotonic() - started
            except (urllib.error.URLError, OSError):  # not listening yet, or still loading
                pass
            if time.monotonic() - started > timeout:
                raise self._failure(f"tritonserver was not ready after {timeout:g} s")
            time.sleep(_POLL_S)

    def poll(self) -> int | None:
        """The server's exit status, None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Blocks until the server ends."""
        return self._process.wait()

    def processes(self) -> list[int]:
        """Pids of the server, its stubs and its engine that live now."""
        entry = f"{MARK}={self._mark}".encode()
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if entry in _environ(pid)]

    def log_tail(self) -> str:
        """The last lines that the server wrote; empty when it writes where this process does."""
        if not self.log or not self.log.exists():
            return ""
        return self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()

    def stop(self) -> None:
        """Lets requests in flight finish for `drain_s`, then ends every process of the server. May be called again."""
        try:
            if self.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                # Triton's own limit is drain_s; beyond it come unloading and the stubs' exit.
                _until(lambda: self.poll() is not None, self._drain_s + _KILL_WAIT_S)
                _until(lambda: not self.processes(), _LEAVE_S)
        finally:
            self.destroy()

    def kill(self) -> None:
        """Ends the server alone by SIGKILL, as a crash would; the others are expected to leave by themselves."""
        self._process.kill()
        self._process.wait()

    def destroy(self) -> None:
        """Ends every process of the server by SIGKILL and removes what it left in /dev/shm and the temporary folder."""
        if self.poll() is None:
            self.kill()

        def gone() -> bool:
            for pid in (alive := self.processes()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not alive

        _until(gone, _KILL_WAIT_S)
        for path in Path("/dev/shm").glob(f"*{self._memory_prefix}*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _failure(self, problem: str) -> MultiloraError:
        tail = self.log_tail()
        return MultiloraError(
            ErrorCode.UNAVAILABLE, f"{problem}; its log ends with:\n{tail}" if tail else f"{problem}; see its log"
        )


def _large_stack() -> list[str]:
    """A command prefix that gives the server's threads room: its HTTP side puts whole bodies on the stack.

    With the usual 8 MiB, a body above 4 MB was seen to end tritonserver 2.51 by SIGSEGV.
    """
    prlimit = shutil.which("prlimit")
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(hard, _STACK_BYTES)
    if prlimit is None or soft == resource.RLIM_INFINITY or soft >= wanted:
        return []
    return [prlimit, f"--stack={wanted}:"]


def _with_parent() -> list[str]:
    """A command prefix that has the kernel end the server in order when this process is killed.

    The kernel takes the thread that starts the server for its parent, so only the main thread may ask for it. Not by
    preexec_fn: that forks, and a fork of a process with open gRPC channels may abort before it comes to exec.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None or threading.current_thread() is not threading.main_thread():
        return []
    return [setpriv, "--pdeathsig", "TERM"]


def _environ(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return []


def _until(done: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def describe(code: int) -> str:
    """How a process ended, by its subprocess return code."""
    return f"ended with status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
