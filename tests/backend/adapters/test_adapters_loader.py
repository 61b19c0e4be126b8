# SPDX-License-Identifier: Apache-2.0
"""Real folders, real threads."""

from __future__ import annotations

import threading

import pytest
import torch

from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.loader import Job, ThreadLoader
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import MultiloraError

TIMEOUT_S = 30


@pytest.fixture
def loaders():
    made = []
    yield lambda *arguments: made.append(ThreadLoader(*arguments)) or made[-1]
    for loader in made:
        loader.close()


def test_folders_through_threads(save, sites, tmp_path):
    save("good", r=3)
    save("rs", use_rslora=True, r=12)
    (save("broken") / "adapter_model.safetensors").write_bytes(b"short")
    news = threading.Semaphore(0)
    manager = AdapterManager(
        Catalogue.read(str(tmp_path)),
        sites,
        device_bytes=10**6,
        host_bytes=10**6,
        dtype=torch.float32,
        device="cpu",
        on_change=news.release,
    )
    manager.check_all(wait_s=TIMEOUT_S)
    assert manager.poll() == ["broken"]
    assert {n: r.rank for n, r in manager.records.items()} == {"good": 3, "rs": 12, "broken": 0}
    for name in ("good", "rs"):
        assert manager.request(name) is AdapterState.LOADING
    for _ in range(3 + 2):
        assert news.acquire(timeout=TIMEOUT_S)
    assert manager.poll() == []
    for name in ("good", "rs"):
        lease = manager.lease(name)
        expected = read_adapter(tmp_path / name, sites, torch.float32)
        assert (lease.version, lease.rank) == (expected.version, expected.rank)
        start, stop = lease.rank_start, lease.rank_start + padded(lease.rank)
        for site, a, b, laid_out in zip(sites, manager.pool.a, manager.pool.b, expected.sites, strict=True):
            slices = len(site.modules)
            assert torch.equal(a[start * slices : stop * slices], laid_out.a)
            assert torch.equal(b[start:stop], laid_out.b)
    with pytest.raises(
        MultiloraError, match=r"LoRA broken could not be loaded: adapter_model.safetensors: is truncated"
    ):
        manager.check("broken")
    # Mended under its old name.
    save("broken", seed=3)
    manager.records["broken"].looked_at -= 10
    manager.check("broken")
    assert manager.request("broken") is AdapterState.LOADING
    assert news.acquire(timeout=TIMEOUT_S)
    manager.poll()
    assert manager.request("broken") is AdapterState.ACTIVE
    manager.close()


def test_what_is_kept_is_used_only_while_the_folder_is_unchanged(save, sites, loaders):
    folder = save()
    loader = loaders(
        lambda f: read_adapter(f, sites, torch.float32), lambda f: check_adapter(f, sites), 1, lambda: None
    )

    def load(known=None, cached=None):
        loader.submit(Job("x", folder, True, known, cached))
        assert loader.wait_idle(TIMEOUT_S)
        (outcome,) = loader.finished()
        return outcome

    first = load()
    assert load(first.fingerprint, first.weights).weights is first.weights
    save(seed=1, r=5)
    second = load(first.fingerprint, first.weights)
    assert second.weights.rank == 5
    assert second.fingerprint != first.fingerprint


def test_loads_overtake_checks_and_no_error_ends_a_thread(tmp_path, loaders):
    gate = threading.Event()
    order: list[str] = []

    def run(folder):
        gate.wait(TIMEOUT_S)
        order.append(folder.name)
        raise {
            "os": OSError(5, "Input/output error"),
            "memory": RuntimeError("CUDA error: out of memory"),
            "odd": ZeroDivisionError("x"),
        }.get(folder.name, MultiloraError("", "bad"))

    loader = loaders(run, run, 1, lambda: None)
    for name in ("first", "check1", "check2"):
        loader.submit(Job(name, tmp_path / name, weights=False))
    for name in ("os", "memory", "odd"):
        loader.submit(Job(name, tmp_path / name, weights=True))
    assert not loader.wait_idle(0.01)
    gate.set()
    assert loader.wait_idle(TIMEOUT_S)
    assert set(order[:4]) == {"first", "os", "memory", "odd"}  # the first may have begun before the loads came
    assert order[4:] == ["check1", "check2"]
    outcomes = {outcome.job.name: outcome for outcome in loader.finished()}
    assert outcomes["os"].reason == "cannot be read: Input/output error"
    assert outcomes["memory"].reason == "cannot be read: CUDA error: out of memory"
    assert outcomes["odd"].reason == "ZeroDivisionError: x"
    # Such causes may pass, so the adapter can be tried again; a refusal stands until the folder changes.
    assert outcomes["os"].fingerprint is None
    assert outcomes["memory"].fingerprint is None
    assert outcomes["first"].fingerprint is not None


def test_close_drops_what_has_not_begun(tmp_path, loaders):
    entered, gate = threading.Event(), threading.Event()
    seen = []

    def run(folder):
        seen.append(folder.name)
        entered.set()
        gate.wait(TIMEOUT_S)
        raise MultiloraError("", "x")

    loader = loaders(run, run, 1, lambda: None)
    for i in range(5):
        loader.submit(Job(str(i), tmp_path, weights=True))
    assert entered.wait(TIMEOUT_S)
    closing = threading.Thread(target=loader.close)
    closing.start()
    gate.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert len(seen) <= 2
