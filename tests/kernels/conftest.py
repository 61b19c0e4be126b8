# SPDX-License-Identifier: Apache-2.0
"""Cases for the kernels, and where they run: on CUDA, and in Triton's interpreter in a process of its own.

`TRITON_INTERPRET=1 pytest tests/kernels` runs the interpreter's tests in the process itself, e.g. under a debugger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interpreter import Interpreter
from multilora_kernels import NO_ADAPTER, Delta, SegmentPlan, Segments, padded_rank, plan_segments
from multilora_kernels._triton import INTERPRETED, triton

CHILD = Path(__file__).with_name("interpreter_child.py")
_interpreter = pytest.StashKey[Interpreter]()


def _wants_interpreter(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    targets = [callspec.params.get(name) for name in ("target", "one_target")] if callspec else []
    return any(isinstance(target, Target) and target.device == "cpu" for target in targets)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and _wants_interpreter(item):
            item.add_marker(pytest.mark.timeout(0))  # the child sees to it, whose own start is not the test's


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if INTERPRETED or triton is None or not _wants_interpreter(item):
        return None
    stash = item.session.stash
    if _interpreter not in stash or stash[_interpreter].ended:
        stash[_interpreter] = Interpreter(CHILD, item.config.rootpath)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    following = nextitem if nextitem is not None and _wants_interpreter(nextitem) else None
    for report in stash[_interpreter].run(item, following):
        item.ihook.pytest_runtest_logreport(report=report)
    # The item before may have left its file's fixtures set up for this one, which does not run here.
    item.session._setupstate.teardown_exact(nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _interpreter in session.stash:
        session.stash[_interpreter].close()


@dataclass(frozen=True)
class Target:
    """Where a kernel runs and in which dtype. The interpreter's bfloat16 dot is wrong, so bfloat16 is for CUDA only."""

    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        name = "interpreter" if self.device == "cpu" else "cuda"
        return f"{name}-{str(self.dtype).removeprefix('torch.')}"


ON_CPU = Target("cpu", torch.float32)
INTERPRETER_TARGETS = [Target("cpu", torch.float32), Target("cpu", torch.float16)]
CUDA_TARGETS = [Target("cuda", torch.bfloat16), Target("cuda", torch.float32)]


def _parameter(target: Target) -> Any:
    return pytest.param(target, id=str(target), marks=pytest.mark.gpu if target.device == "cuda" else ())


def _usable(target: Target) -> Target:
    if target.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
    if target.device == "cpu" and triton is None:
        pytest.skip("needs Triton-lang, which is not installed")
    return target


@pytest.fixture(params=map(_parameter, (*INTERPRETER_TARGETS, *CUDA_TARGETS)))
def target(request: pytest.FixtureRequest) -> Target:
    """A test that uses it runs on every target; without CUDA those on CUDA are skipped."""
    return _usable(request.param)


@pytest.fixture(params=map(_parameter, (INTERPRETER_TARGETS[0], CUDA_TARGETS[0])))
def one_target(request: pytest.FixtureRequest) -> Target:
    """For what does not depend on the dtype: how an operator is declared, and what it refuses."""
    return _usable(request.param)


@dataclass(frozen=True)
class Case:
    """A fused linear with its rank pools and a batch. Whatever no adapter owns in the pools is NaN."""

    x: torch.Tensor
    y: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    widths: tuple[int, ...]
    rows: np.ndarray
    rank_start: np.ndarray
    rank: np.ndarray
    h_start: np.ndarray | None
    """Where each adapter's ranks lie in h if h is a border; there is more room in it than they need."""

    @property
    def slices(self) -> int:
        return len(self.widths)

    def segments(self, block_m: int) -> Segments:
        return plan_segments(self.rows, self.rank_start, self.rank, block_m, self.h_start).to(self.x.device)

    def a_of(self, slot: int) -> torch.Tensor:
        """[slices, rank, K], a view of the pool."""
        start, padded = int(self.rank_start[slot]), padded_rank(int(self.rank[slot]))
        block = self.a[start * self.slices : (start + padded) * self.slices]
        return block.view(self.slices, padded, -1)[:, : self.rank[slot]]

    def b_of(self, slot: int) -> torch.Tensor:
        """[rank, N], a view of the pool."""
        return self.b[self.rank_start[slot] : self.rank_start[slot] + self.rank[slot]]

    def h_of(self, h: torch.Tensor, token: int, plan: SegmentPlan) -> torch.Tensor:
        """[slices, rank], the token's own part of h, a view."""
        slot = int(self.rows[token])
        rank = int(self.rank[slot])
        if self.h_start is None:
            return h[token].view(self.slices, plan.h_ranks)[:, :rank]
        start, padded = int(self.h_start[slot]), padded_rank(rank)
        own = h[token, start * self.slices : (start + padded) * self.slices]
        return own.view(self.slices, padded)[:, :rank]

    def with_adapter(self) -> list[int]:
        return [token for token, slot in enumerate(self.rows.tolist()) if slot >= 0 and self.rank[slot] > 0]

    def delta(self, segments: Segments) -> Delta:
        """x A^T in the layout of the plan, with NaN in every column that is not a token's own."""
        plan = segments.plan
        ranks = plan.h_ranks if self.h_start is None else border_ranks(self.rank)
        # Wider than needed, as a border is when other adapters are resident, and a row stride that is no page.
        storage = torch.full((len(self.rows), self.slices * ranks + 5), torch.nan)
        h = storage.to(self.x)[:, : self.slices * ranks]
        for token in self.with_adapter():
            own = self.h_of(h, token, plan)
            own.copy_(self.a_of(int(self.rows[token])).double() @ self.x[token].double())
        return Delta(h, self.b, segments)

    def check_delta(self, actual: torch.Tensor, before: torch.Tensor, delta: Delta) -> None:
        """actual = before + LoRA, elementwise: float32 sums over ranks, one rounding, and the other rows as before."""
        fp32, rounding = torch.finfo(torch.float32).eps, torch.finfo(actual.dtype).eps
        without_adapter = sorted(set(range(len(self.rows))) - set(self.with_adapter()))
        others, others_before = actual[without_adapter], before[without_adapter]
        assert torch.equal(others, others_before), "rows without adapter"
        assert torch.equal(others.signbit(), others_before.signbit()), "rows without adapter, bit for bit"
        for token in self.with_adapter():
            h = self.h_of(delta.h, token, delta.segments.plan).double()
            b_slices = self.b_of(int(self.rows[token])).double().split(self.widths, dim=1)
            base = before[token].double()
            lora = torch.cat([own @ b for own, b in zip(h, b_slices, strict=True)])
            magnitude = base.abs() + torch.cat([own.abs() @ b.abs() for own, b in zip(h, b_slices, strict=True)])
            error = (actual[token].double() - (base + lora)).abs()
            assert (error <= (h.shape[1] + 2) * fp32 * magnitude + rounding * (base + lora).abs()).all()

    def to(self, device: str, dtype: torch.dtype | None = None) -> Case:
        tensors = {name: getattr(self, name).to(device, dtype) for name in ("x", "y", "a", "b")}
        return replace(self, **tensors)

    def take(self, tokens: np.ndarray) -> Case:
        """The same adapters with these tokens only, in this order."""
        index = torch.from_numpy(tokens).to(self.x.device)
        return replace(self, x=self.x[index], y=self.y[index], rows=self.rows[tokens])


def border_ranks(rank: np.ndarray) -> int:
    return sum(padded_rank(own) + 8 for own in rank.tolist())


@pytest.fixture(params=[Target("cpu", torch.float32), Target("cpu", torch.bfloat16)], ids=["float32", "bfloat16"])
def reference_target(request: pytest.FixtureRequest) -> Target:
    """Where the references are tested: in torch on the CPU, in this process."""
    return request.param


@pytest.fixture
def make_case() -> Callable[..., Case]:
    def make(
        rows: list[int],
        target: Target = ON_CPU,
        *,
        ranks: tuple[int, ...],
        k: int = 100,
        widths: tuple[int, ...] = (150, 33, 7),
        bordered: bool = False,
    ) -> Case:
        generator = torch.Generator().manual_seed(len(rows) + k)
        pages = -(-np.array(ranks, np.int32) // 8) * 8
        # Adapters lie in the pool in reverse order, a free page behind each, and in the border in order.
        rank_start = (np.cumsum((pages + 8)[::-1])[::-1] - pages).astype(np.int32)
        h_start = (np.cumsum(pages + 8) - pages).astype(np.int32) if bordered else None
        size = int((pages + 8).sum() + 8)
        case = Case(
            x=torch.randn(len(rows), k, generator=generator),
            y=torch.randn(len(rows), sum(widths), generator=generator),
            a=torch.full((size * len(widths), k), torch.nan), b=torch.full((size, sum(widths)), torch.nan),
            widths=widths, rows=np.array(rows, np.int32),
            rank_start=rank_start, rank=np.array(ranks, np.int32), h_start=h_start,
        )  # fmt: skip
        for slot in range(len(ranks)):
            block = slice(rank_start[slot] * case.slices, (rank_start[slot] + pages[slot]) * case.slices)
            case.a[block] = 0
            for own in (case.a_of(slot), case.b_of(slot)):
                own.copy_(torch.randn(own.shape, generator=generator))
        case.y[:, ::7] = -0.0  # which becomes 0.0 where anything is added to it
        return case.to(target.device, target.dtype)

    return make


RANKS = (1, 8, 16, 17, 40, 64)
BATCHES: dict[str, tuple[list[int], tuple[int, ...]]] = {
    "mixed": ([3, -1, 0, 5, 5, -1, 1, 2, 4, 4, 0, -1, 3, 5], RANKS),
    "one_adapter_many_tiles": ([1] * 35, RANKS),
    "one_adapter_in_many_rows": ([-1, 2] * 20, RANKS),
    "one_token": ([4], RANKS),
    "one_token_of_rank_1": ([0], (1,)),
    "one_token_without_adapter": ([NO_ADAPTER], RANKS),
    "no_token": ([], RANKS),
    "rank_beyond_a_block": ([1, 0, 1, -1], (5, 150)),
}


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> tuple[list[int], tuple[int, ...]]:
    """(rows, ranks of the adapters)."""
    return BATCHES[request.param]
