# SPDX-License-Identifier: Apache-2.0
"""Where tritonserver is on this machine, and what it needs around it to run.

Four places, first one wins: `$TRITON_HOME` (an unpacked server, with `$TRITON_STUB_ENV` as the environment of its
Python stub), PATH, /opt/tritonserver (the NGC container) and the nvidia-pytriton wheel of this environment.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from multilora_backend.errors import ErrorCode, MultiloraError

CONTAINER = Path("/opt/tritonserver")
SAVED_LIBRARY_PATH = "MLENGINE_LD_LIBRARY_PATH"
"""Carries the caller's LD_LIBRARY_PATH past the server: the engine process must not find the server's libraries."""


@dataclass(frozen=True)
class Installation:
    """One tritonserver. Empty fields mean that the server's own defaults are right."""

    binary: Path
    origin: str
    """Which of the places it was found in, for logs."""
    backends: Path | None = None
    libraries: tuple[Path, ...] = ()
    stub_bin: Path | None = None
    """The folder whose `python3` is the Python stub's: the stub takes its environment from the first one on PATH."""

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with what this server needs; the caller's LD_LIBRARY_PATH is kept under SAVED_LIBRARY_PATH."""
        environment = dict(base)
        own = environment.get("LD_LIBRARY_PATH", "")
        environment[SAVED_LIBRARY_PATH] = own
        libraries = [*map(str, self.libraries), *filter(None, [own])]
        if libraries:
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        if self.stub_bin:
            environment["PATH"] = os.pathsep.join([str(self.stub_bin), environment.get("PATH", os.defpath)])
        return environment

    def flags(self) -> list[str]:
        return [f"--backend-directory={self.backends}"] if self.backends else []


def find(environ: Mapping[str, str]) -> Installation:
    """The tritonserver to use. Raises MultiloraError(UNAVAILABLE) that says where was looked."""
    home = environ.get("TRITON_HOME")
    if home:
        return _unpacked(Path(home), environ.get("TRITON_STUB_ENV"))
    on_path = shutil.which("tritonserver", path=environ.get("PATH", os.defpath))
    if on_path:
        return Installation(Path(on_path), "PATH", stub_bin=_environment_bin())
    binary = CONTAINER / "bin" / "tritonserver"
    if os.access(binary, os.X_OK):
        return Installation(binary, str(CONTAINER), stub_bin=_environment_bin())
    wheel = Path(sysconfig.get_path("purelib"), "pytriton", "tritonserver")
    if (wheel / "bin" / "tritonserver").exists():
        return _from_wheel(wheel)
    raise MultiloraError(
        ErrorCode.UNAVAILABLE,
        f"tritonserver: not found by $TRITON_HOME, on PATH, in {CONTAINER} or in {wheel}; "
        "`pip install --no-deps nvidia-pytriton==0.7.0` brings one",
    )


def _unpacked(home: Path, stub_environment: str | None) -> Installation:
    binary = home / "bin" / "tritonserver"
    if not os.access(binary, os.X_OK):
        raise MultiloraError(ErrorCode.UNAVAILABLE, f"TRITON_HOME: {binary} is not an executable file")
    return Installation(
        binary,
        "TRITON_HOME",
        backends=home / "backends",
        libraries=(home / "libs", *_python_libraries()),
        stub_bin=Path(stub_environment) / "bin" if stub_environment else _environment_bin(),
    )


def _environment_bin() -> Path | None:
    """This interpreter's own virtual environment; without one, PATH already says which python3 is meant."""
    return Path(sys.prefix, "bin") if sys.prefix != sys.base_prefix else None


def libpython() -> Path | None:
    """The shared library of this CPython, which the Python stub links; None if this Python came without it.

    Debian packages it apart from python3; the set-up then puts it into the environment.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = (f"{sys.prefix}/triton/lib", sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib")
    return next((path for folder in folders if (path := Path(folder, name)).exists()), None)


def _python_libraries() -> tuple[Path, ...]:
    library = libpython()
    return (library.parent,) if library else ()


def _from_wheel(wheel: Path) -> Installation:
    """The wheel keeps one stub for each CPython apart; the backend wants its stub beside it, in a folder of our own."""
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / minor / "triton_python_backend_stub"
    if not stub.exists():
        known = ", ".join(sorted(path.name for path in stub.parent.parent.iterdir()))
        raise MultiloraError(
            ErrorCode.UNSUPPORTED, f"tritonserver: the wheel has no stub for CPython {minor}, only {known}"
        )
    backends = Path(sys.prefix, "triton", f"cp{minor}", "backends")
    library = wheel / "backends" / "python"
    for source in (library / "libtriton_python.so", library / "triton_python_backend_utils.py", stub):
        _link(source, backends / "python" / source.name)
    libraries = (wheel.parent.parent / "nvidia_pytriton.libs", *_python_libraries())
    return Installation(
        wheel / "bin" / "tritonserver",
        "nvidia-pytriton wheel",
        backends=backends,
        libraries=libraries,
        stub_bin=Path(sys.prefix, "bin"),
    )


def _link(source: Path, target: Path) -> None:
    """Makes a symbolic link in one step, so that servers that start at the same time never see half a folder."""
    if target.is_symlink() and os.readlink(target) == str(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mktemp(prefix=f".{target.name}.", dir=target.parent)
    os.symlink(source, temporary)
    os.replace(temporary, target)
