# SPDX-License-Identifier: Apache-2.0
"""Which tritonserver is taken, and what it finds in its environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from multilora_backend import tritonserver
from multilora_backend.errors import ErrorCode, MultiloraError


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.touch(mode=0o755)
    return path


def test_the_first_place_that_has_a_tritonserver_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tritonserver, "CONTAINER", tmp_path / "container")
    on_path = executable(tmp_path / "path" / "tritonserver")
    home = executable(tmp_path / "home" / "bin" / "tritonserver")
    environ = {"PATH": str(tmp_path / "nothing")}
    assert "pytriton" in str(tritonserver.find(environ).binary)
    container = executable(tmp_path / "container" / "bin" / "tritonserver")
    assert tritonserver.find(environ).binary == container
    environ["PATH"] += os.pathsep + str(on_path.parent)
    assert tritonserver.find(environ).binary == on_path
    environ |= {"TRITON_HOME": str(tmp_path / "home"), "TRITON_STUB_ENV": "/stub"}
    found = tritonserver.find(environ)
    assert found.binary == home
    assert found.flags() == [f"--backend-directory={tmp_path / 'home' / 'backends'}"]
    assert found.environment(environ)["PATH"].split(os.pathsep)[0] == "/stub/bin"

    home.unlink()
    with pytest.raises(MultiloraError, match=r"^TRITON_HOME: .*/home/bin/tritonserver is not an executable file"):
        tritonserver.find(environ)


def test_without_any_tritonserver_the_error_says_where_was_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tritonserver, "CONTAINER", tmp_path / "container")
    monkeypatch.setattr(tritonserver.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    with pytest.raises(MultiloraError, match=r"(?s)TRITON_HOME.*PATH.*container.*site.*nvidia-pytriton==") as error:
        tritonserver.find({"PATH": str(tmp_path)})
    assert error.value.code is ErrorCode.UNAVAILABLE


@pytest.mark.parametrize("own", [None, "/of/the/caller"])
def test_the_servers_libraries_come_first_and_the_callers_are_kept(own: str | None) -> None:
    base = {"PATH": "/bin"} | ({"LD_LIBRARY_PATH": own} if own else {})
    there = tritonserver.Installation(Path("/t"), "test", libraries=(Path("/a"), Path("/b")))
    environment = there.environment(base)
    assert environment["LD_LIBRARY_PATH"] == (f"/a:/b:{own}" if own else "/a:/b")
    assert environment[tritonserver.SAVED_LIBRARY_PATH] == (own or "")
    assert environment["PATH"] == "/bin"
    plain = tritonserver.Installation(Path("/t"), "test").environment(base)
    assert plain.get("LD_LIBRARY_PATH") == own
