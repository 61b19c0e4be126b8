# SPDX-License-Identifier: Apache-2.0
"""Real folders, real threads."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.jobs import Job, Purpose
from multilora_backend.adapters.loader import SWITCH_INTERVAL_S, ThreadLoader
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.peft import check_adapter, read_adapter
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.sources import Kind, Source
from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import MultiloraError

TIMEOUT_S = 30


@pytest.fixture
def loaders():
    made = []
    yield lambda *arguments: made.append(ThreadLoader(*arguments)) or made[-1]
    for loader in made:
        loader.close()


def job(folder: Path, purpose: Purpose = Purpose.DEVICE, **more) -> Job:
    return Job(folder.name, Source.of_folder(folder), purpose, **more)


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
        watched=True,
    )
    manager.check_all(wait_s=TIMEOUT_S)
    assert manager.poll().failed == ["broken"]
    assert {n: r.rank for n, r in manager.records.items()} == {"good": 3, "rs": 12, "broken": 0}
    for name in ("good", "rs"):
        assert manager.request(name) is AdapterState.LOADING
    for _ in range(3 + 2):
        assert news.acquire(timeout=TIMEOUT_S)
    assert manager.poll().failed == []
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
        manager.resolve("broken")
    # Mended under its old name.
    save("broken", seed=3)
    manager.reconcile(Catalogue.read(str(tmp_path)).entries)
    key = manager.resolve("broken")
    assert manager.request(key) is AdapterState.LOADING
    # Its check and its load end in any order.
    for _ in range(2):
        assert news.acquire(timeout=TIMEOUT_S)
    manager.poll()
    assert manager.request(key) is AdapterState.ACTIVE
    manager.close()


def test_what_is_kept_is_used_only_while_the_folder_is_unchanged(save, sites, loaders):
    folder = save()
    loader = loaders(
        lambda f, source: read_adapter(f, sites, torch.float32),
        lambda f, source: check_adapter(f, sites),
        1,
        lambda: None,
    )

    def load(purpose=Purpose.DEVICE, **more):
        loader.submit(job(folder, purpose, **more))
        assert loader.wait_idle(TIMEOUT_S)
        (outcome,) = loader.finished()
        return outcome

    first = load()
    assert first.seconds > 0
    again = load(known=first.fingerprint, cached=first.weights)
    assert again.weights is first.weights
    assert again.seconds == 0
    save(seed=1, r=5)
    second = load(known=first.fingerprint, cached=first.weights)
    assert second.weights.rank == 5
    assert second.fingerprint != first.fingerprint
    # A revision that was replaced is what it was.
    assert load(known=first.fingerprint, cached=first.weights, frozen=True).weights is first.weights
    look = load(Purpose.LOOK)
    assert (look.fingerprint, look.weights, look.plan, look.reason) == (second.fingerprint, None, None, "")


def test_what_is_not_local_is_located_in_the_thread_and_not_for_what_is_kept(save, sites, loaders):
    folder = save()
    located = []

    def locate(source):
        located.append((source.text, threading.current_thread().name))
        if source.location.endswith("gone"):
            raise MultiloraError("", "is gone")
        return folder

    def load(location, **more):
        loader.submit(Job("x", Source(Kind.URL, location), Purpose.DEVICE, **more))
        assert loader.wait_idle(TIMEOUT_S)
        (outcome,) = loader.finished()
        return outcome

    loader = loaders(
        lambda f, source: read_adapter(f, sites, torch.float32), lambda f, source: None, 1, lambda: None, locate
    )
    first = load("https://h/x")
    assert [where for where, thread in located if thread != threading.main_thread().name] == ["https://h/x"]
    assert first.weights.rank == 4
    assert load("https://h/x", known=first.fingerprint, cached=first.weights).weights is first.weights
    assert len(located) == 1
    gone = load("https://h/gone")
    assert (gone.reason, gone.fingerprint) == ("is gone", None)


def test_loads_overtake_checks_and_no_error_ends_a_thread(tmp_path, loaders):
    entered, gate = threading.Event(), threading.Event()
    order: list[str] = []

    def run(folder, source):
        entered.set()
        gate.wait(TIMEOUT_S)
        order.append(folder.name)
        raise {
            "os": OSError(5, "Input/output error"),
            "memory": RuntimeError("CUDA error: out of memory"),
            "odd": ZeroDivisionError("x"),
        }.get(folder.name, MultiloraError("", "bad"))

    loader = loaders(run, run, 1, lambda: None)
    for name in ("first", "check1", "check2"):
        loader.submit(job(tmp_path / name, Purpose.CHECK))
        assert entered.wait(TIMEOUT_S)
    loader.submit(job(tmp_path / "early", Purpose.HOST))
    for name in ("os", "memory", "odd"):
        loader.submit(job(tmp_path / name))
    assert not loader.wait_idle(0.01)
    gate.set()
    assert loader.wait_idle(TIMEOUT_S)
    assert order == ["first", "os", "memory", "odd", "early", "check1", "check2"]
    outcomes = {outcome.job.key: outcome for outcome in loader.finished()}
    assert outcomes["os"].reason == "cannot be read: Input/output error"
    assert outcomes["memory"].reason == "cannot be read: CUDA error: out of memory"
    assert outcomes["odd"].reason == "ZeroDivisionError: x"
    # Such causes may pass, so the adapter can be tried again; a refusal stands until the folder changes.
    assert outcomes["os"].fingerprint is None
    assert outcomes["memory"].fingerprint is None
    assert outcomes["first"].fingerprint is not None


def test_what_somebody_waits_for_by_now_is_not_overtaken_any_more(tmp_path, loaders):
    entered, gate = threading.Event(), threading.Event()
    order: list[str] = []

    def run(folder, source):
        entered.set()
        gate.wait(TIMEOUT_S)
        order.append(folder.name)
        raise MultiloraError("", "x")

    loader = loaders(run, run, 1, lambda: None)
    first, early = job(tmp_path / "first"), job(tmp_path / "early", Purpose.HOST)
    loader.submit(first)
    assert entered.wait(TIMEOUT_S)
    for each in (early, job(tmp_path / "other", Purpose.HOST), job(tmp_path / "a")):
        loader.submit(each)
    loader.hurry(early)
    loader.hurry(first)  # which has begun
    loader.submit(job(tmp_path / "b"))
    gate.set()
    assert loader.wait_idle(TIMEOUT_S)
    assert order == ["first", "a", "early", "b", "other"]
    assert len(loader.finished()) == 5
    loader.hurry(early)  # which has ended
    assert loader.wait_idle(TIMEOUT_S)
    assert not loader.finished()


def test_close_drops_what_has_not_begun(tmp_path, loaders):
    entered, gate = threading.Event(), threading.Event()
    seen = []

    def run(folder, source):
        seen.append(folder.name)
        entered.set()
        gate.wait(TIMEOUT_S)
        raise MultiloraError("", "x")

    loader = loaders(run, run, 1, lambda: None)
    for i in range(5):
        loader.submit(job(tmp_path / str(i)))
    assert entered.wait(TIMEOUT_S)
    closing = threading.Thread(target=loader.close)
    closing.start()
    gate.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert len(seen) <= 2


def test_the_step_loop_gets_the_interpreter_back_soon(loaders):
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        loaders(read_adapter, check_adapter, 0, lambda: None)
        assert sys.getswitchinterval() == pytest.approx(0.005), "without threads nobody is in the way"
        loaders(read_adapter, check_adapter, 1, lambda: None)
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    finally:
        sys.setswitchinterval(before)
