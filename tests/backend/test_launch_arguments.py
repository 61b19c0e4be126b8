# SPDX-License-Identifier: Apache-2.0
"""What a launch makes of a repository and of headers, without any process."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import pytest

from multilora_backend import launch_arguments
from multilora_backend.launcher import REPOSITORY


def test_no_header_is_forwarded_unless_it_is_named():
    assert launch_arguments.header_flags({"MULTILORA_MODEL": "m", "MULTILORA_TENANT_HEADER": ""}) == []


@pytest.mark.parametrize(
    ("variables", "forwarded", "kept"),
    [
        ({"TENANT_HEADER": "X-Tenant"}, ["X-Tenant", "x-tenant"], ["X-Tenant-Id", "A-X-Tenant", "X.Tenant", ""]),
        ({"PRIORITY_HEADER": "prio"}, ["Prio"], ["priority", "x"]),
        ({"TENANT_HEADER": "t", "PRIORITY_HEADER": "p"}, ["T", "P"], ["tp", "t|p", "authorization"]),
    ],
)
def test_only_the_named_headers_are_forwarded(variables: dict[str, str], forwarded: list[str], kept: list[str]):
    flags = launch_arguments.header_flags({f"MULTILORA_{name}": value for name, value in variables.items()})
    assert [flag.partition("=")[0] for flag in flags] == [
        "--http-header-forward-pattern",
        "--grpc-header-forward-pattern",
    ]
    for flag in flags:
        pattern = re.compile(flag.partition("=")[2])
        assert all(pattern.search(name) for name in forwarded)
        assert not any(pattern.search(name) for name in kept)


def test_the_administration_is_loaded_where_it_is(tmp_path: Path):
    assert launch_arguments.models(REPOSITORY) == ["multilora", "multilora_adapters"]
    assert launch_arguments.models(tmp_path) == ["multilora"]
    made = launch_arguments.with_instances(REPOSITORY, tmp_path / "made", 3)
    assert launch_arguments.models(made) == ["multilora", "multilora_adapters"]
    assert (made / "multilora_adapters" / "1" / "model.py").samefile(REPOSITORY / "multilora_adapters/1/model.py")
    assert "count: 3" in (made / "multilora" / "config.pbtxt").read_text()


@pytest.mark.parametrize(("kernels", "first"), [("30000 60000", 29_900), ("29903\t60999\n", 29_900)])
def test_free_ports_are_none_that_the_kernel_gives_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, first: int
):
    monkeypatch.setattr(launch_arguments, "KERNEL_PORTS", tmp_path / "range")
    monkeypatch.setattr(launch_arguments, "FIRST_FREE_PORT", first)
    monkeypatch.setattr(launch_arguments, "TRIES", 3)
    (tmp_path / "range").write_text(kernels)
    end = int(kernels.split()[0])
    chosen = launch_arguments.ports("127.0.0.1", {"http": 0, "grpc": 0, "metrics": 0})
    assert len({*chosen.values()} & {*range(first, end)}) == 3
    with contextlib.ExitStack() as others:
        for port in range(first, end):
            with contextlib.suppress(OSError):  # somebody has it already
                others.enter_context(socket.create_server(("127.0.0.1", port)))
        assert launch_arguments.ports("127.0.0.1", {"http": 0})["http"] not in range(first, end)


@pytest.mark.parametrize("kernels", [None, "1024 65535", "20000 60000", "", "what"])
def test_where_the_kernel_leaves_none_it_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str | None):
    monkeypatch.setattr(launch_arguments, "KERNEL_PORTS", tmp_path / "range")
    if kernels is not None:
        (tmp_path / "range").write_text(kernels)
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert launch_arguments.ports("127.0.0.1", {"http": 0})["http"] >= first
