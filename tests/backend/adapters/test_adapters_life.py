# SPDX-License-Identifier: Apache-2.0
"""Random lives of many adapters: whatever is requested, leased, broken and mended, nothing leased ever moves."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapter_bench import Bench, weights_of
from multilora_backend.adapters.manager import Lease
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import MultiloraError

NAMES = [f"a{i}" for i in range(7)]
names = st.sampled_from(NAMES)
contents = st.integers(1, 40) | st.just("broken")
RANKS = 32


class Life(RuleBasedStateMachine):
    @initialize(
        content=st.tuples(*[contents] * len(NAMES)), host_ranks=st.sampled_from([0, 20, 60, 500]), hold=st.booleans()
    )
    def start(self, content, host_ranks, hold):
        self.host_bytes = host_ranks * 20
        contents = dict(zip(NAMES, content, strict=True))
        self.bench = Bench(contents, RANKS, host_bytes=self.host_bytes, load_threads=2, hold=hold)
        self.manager = self.bench.manager
        self.held: list[tuple[Lease, int]] = []

    @rule()
    def check_all(self):
        self.manager.check_all()

    @rule(name=names, protect=st.sets(names))
    def request(self, name, protect):
        before = set(self.manager.resident())
        state = self.manager.request(name, protect)
        assert state is self.manager.records[name].state
        gone = before - set(self.manager.resident())
        assert gone.isdisjoint(protect)
        assert not gone or state is AdapterState.LOADING

    @rule(name=names)
    def lease(self, name):
        lease = self.manager.lease(name)
        assert (lease is None) == (self.bench.state(name) is not AdapterState.ACTIVE)
        if lease is not None:
            assert lease.version == f"{name}-r{lease.rank}"
            self.held.append(lease)

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            index = data.draw(st.integers(0, len(self.held) - 1))
            self.manager.release(self.held.pop(index))

    @rule(count=st.integers(1, 4), seconds=st.floats(0, 5))
    def time_passes(self, count, seconds):
        self.bench.clock.now += seconds
        self.bench.loader.run(count)

    @rule(count=st.integers(1, 3))
    def transfers_end(self, count):
        self.bench.arrive(count)

    @rule()
    def a_transfer_fails(self):
        if self.bench.held:
            self.bench.held.pop().error = RuntimeError("the device is odd")

    @rule()
    def poll(self):
        failed = self.manager.poll()
        assert all(self.bench.state(name) is AdapterState.FAILED for name in failed)

    @rule(name=names, content=contents)
    def change_content(self, name, content):
        # A folder whose files did not change is what it was: only what nobody has read yet may change here.
        unseen = all(outcome.job.name != name for outcome in self.bench.loader.outcomes)
        if unseen and not self.manager.records[name].version:
            self.bench.loader.content[name] = content

    @invariant()
    def leased_adapters_lie_where_they_lay(self):
        pool = self.manager.pool
        for lease in self.held:
            assert self.bench.state(lease.name) is AdapterState.ACTIVE
            assert (pool.rank_start[lease.slot], pool.rank[lease.slot]) == (lease.rank_start, lease.rank)
            assert pool.generation[lease.slot] == lease.generation
            rows = slice(lease.rank_start, lease.rank_start + padded(lease.rank))
            site = weights_of(lease.name, lease.rank).sites[0]
            assert torch.equal(pool.a[0][rows], site.a)
            assert torch.equal(pool.b[0][rows], site.b)

    @invariant()
    def nothing_overlaps_and_budgets_hold(self):
        pool = self.manager.pool
        moving = len(self.manager._transfers)
        assert self.manager.transferring == (moving > 0)
        assert (pool.rank > 0).sum() == len(self.manager.resident()) + moving
        spans = [(int(s), int(s) + padded(int(r))) for s, r in zip(pool.rank_start, pool.rank, strict=True) if r]
        taken = [rank for start, stop in spans for rank in range(start, stop)]
        assert len(taken) == len(set(taken))
        assert max(taken, default=0) < RANKS
        assert self.manager._host.nbytes <= self.host_bytes

    @invariant()
    def counts_are_right(self):
        states = [record.state for record in self.manager.records.values()]
        by_state = self.manager.stats().by_state
        assert by_state == {state.value: states.count(state) for state in AdapterState}
        leases = {name: record.leases for name, record in self.manager.records.items()}
        assert leases == {name: sum(lease.name == name for lease in self.held) for name in NAMES}

    def teardown(self):
        """Once leases are given back, every adapter that is asked for becomes ACTIVE or FAILED, one after the other."""
        if not hasattr(self, "held"):
            return
        while self.held:
            self.manager.release(self.held.pop())
        self.manager.poll()
        self.bench.clock.now += 10
        for name in NAMES:
            # What failed on its way to the device is not broken.
            if self.manager.records[name].reason.startswith("cannot be copied"):
                self.manager.check(name)
                assert self.bench.state(name) is AdapterState.COLD
            for _ in range(4):
                state = self.manager.request(name)
                if state in (AdapterState.ACTIVE, AdapterState.FAILED):
                    break
                self.bench.land()
                self.bench.arrive()
                self.manager.poll()
            content = self.bench.loader.content[name]
            if state is AdapterState.FAILED:
                try:
                    self.manager.check(name)
                    raise AssertionError("a FAILED adapter passed its check")
                except MultiloraError:
                    continue
            assert state is AdapterState.ACTIVE
            assert isinstance(content, int)
            assert padded(content) <= RANKS


Life.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestLife = Life.TestCase
