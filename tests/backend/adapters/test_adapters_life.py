# SPDX-License-Identifier: Apache-2.0
"""Random lives of many adapters under traffic and commands: whatever happens, nobody gets anything but his own."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapter_bench import BYTES_PER_RANK, Bench, version_of
from adapter_holders import Holder, Holders
from composition_bench import content_of
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.state import AdapterState
from multilora_backend.errors import MultiloraError
from profiles import examples

FOLDERS = ("a", "b", "c", "d", "e")
CONFIGURED, LOADED, ALIASES = FOLDERS[:3], ("x", "y"), ("prod", "blue")
RANKS = 32
names = st.sampled_from([*CONFIGURED, *LOADED])
folders = st.sampled_from(FOLDERS)
contents = st.integers(1, 40) | st.sampled_from(["broken", OSError("away")])
WEIGHTS = ("0.5", "-1", "2", "1", "0")
ACTIVE, FAILED = AdapterState.ACTIVE, AdapterState.FAILED


class Life(RuleBasedStateMachine):
    @initialize(
        content=st.tuples(*[contents] * len(FOLDERS)),
        host_ranks=st.sampled_from([0, 20, 60, 500]),
        hold=st.booleans(),
        watched=st.booleans(),
    )
    def start(self, content, host_ranks, hold, watched):
        self.host_bytes = host_ranks * BYTES_PER_RANK
        by_folder = dict(zip(FOLDERS, content, strict=True))
        configured = {name: by_folder[name] for name in CONFIGURED}
        others = {name: by_folder[name] for name in FOLDERS if name not in CONFIGURED}
        self.bench = Bench(
            configured,
            RANKS,
            hold=hold,
            more_folders=others,
            host_bytes=self.host_bytes,
            load_threads=2,
            watched=watched,
        )
        self.manager, self.loader = self.bench.manager, self.bench.loader
        self.written = {version_of(f, c): (f, c) for f, c in by_folder.items() if isinstance(c, int)}
        """Every content that there ever was."""
        self.holders = Holders(self.manager)

    def pick(self, data) -> Holder | None:
        return data.draw(st.sampled_from(self.holders.all)) if self.holders.all else None

    @rule(name=names | st.sampled_from(ALIASES), digits=st.integers(6, 32), versioned=st.booleans(), data=st.data())
    def submit(self, name, digits, versioned, data):
        try:
            if versioned:
                version = data.draw(st.sampled_from(sorted(self.written) or ["abcdef"]))
                key = self.manager.resolve(f"{name}@{version[:digits]}")
                assert self.manager.records[key].version == version
            else:
                key = self.manager.resolve(name)
        except MultiloraError:
            return
        self.holders.add(key)

    @rule(parts=st.dictionaries(names | st.sampled_from(ALIASES), st.sampled_from(WEIGHTS), min_size=2, max_size=3))
    def submit_composed(self, parts):
        try:
            key = self.manager.resolve(",".join(f"{name}:{weight}" for name, weight in parts.items()))
        except MultiloraError:
            return
        if key:
            self.holders.add(key)

    @rule(data=st.data(), protect=st.sets(names))
    def request(self, data, protect):
        holder = self.pick(data)
        if holder is None or holder.lease is not None:
            return
        before, failed = set(self.manager.resident()), self.manager.stats().by_state["failed"]
        state = self.manager.request(holder.key, protect)
        gone = before - set(self.manager.resident())
        assert gone.isdisjoint(protect)
        assert not gone or state is AdapterState.LOADING
        assert state is self.manager.records[holder.key].state
        assert self.manager.stats().by_state["failed"] - failed in (0, 1)

    @rule(data=st.data())
    def run(self, data):
        holder = self.pick(data)
        if holder is not None and holder.lease is None:
            self.holders.run(holder)

    @rule(data=st.data())
    def pause(self, data):
        holder = self.pick(data)
        if holder is not None:
            self.holders.pause(holder)

    @rule(data=st.data())
    def cancel_or_finish(self, data):
        holder = self.pick(data)
        if holder is not None:
            self.holders.end(holder)

    @rule(name=names)
    def prefetch(self, name):
        if name in self.manager.records:
            self.manager.prefetch(name)

    @rule(
        action=st.sampled_from(["load", "unload", "pin", "unpin", "preload", "alias", "unalias"]),
        name=names,
        alias=st.sampled_from(ALIASES),
        folder=folders | st.just(""),
        versioned=st.booleans(),
    )
    def command(self, action, name, alias, folder, versioned):
        try:
            match action:
                case "load":
                    self.manager.load(name, folder, pinned=versioned)
                case "alias":
                    version = self.manager.show(name).version
                    self.manager.alias(alias, f"{name}@{version}" if version and versioned else name)
                case "unalias":
                    self.manager.unalias(alias)
                case _:
                    getattr(self.manager, action)(name)
        except MultiloraError:
            return

    @rule(folder=folders, content=contents)
    def change_content(self, folder, content):
        self.loader.change(folder, content)
        if isinstance(content, int):
            self.written[version_of(folder, content)] = folder, content

    @rule(gone=st.sets(st.sampled_from(CONFIGURED), max_size=1))
    def reconcile(self, gone):
        self.bench.names = list(CONFIGURED)
        self.bench.reconcile(**dict.fromkeys(gone))

    @rule()
    def check_all(self):
        self.manager.check_all()

    @rule(count=st.integers(1, 4), seconds=st.floats(0, 5))
    def time_passes(self, count, seconds):
        self.bench.clock.now += seconds
        self.loader.run(count)

    @rule(count=st.integers(1, 3))
    def transfers_end(self, count):
        self.bench.arrive(count)

    @rule()
    def a_transfer_fails(self):
        if self.bench.held:
            self.bench.held.pop().error = RuntimeError("the device is odd")

    @rule()
    def poll(self):
        self.holders.take_in(self.manager.poll())

    @invariant()
    def what_is_leased_is_what_its_version_says(self):
        pool = self.manager.pool
        for holder in self.holders.all:
            if holder.lease is not None:
                slot, record = holder.lease.slot, self.manager.records[holder.key]
                assert record.state is ACTIVE
                assert pool.generation[slot] == holder.lease.generation
                site = content_of(record, self.written).sites[0]
                start = int(pool.rank_start[slot])
                rows = slice(start, start + padded(int(pool.rank[slot])))
                assert torch.equal(pool.a[0][rows], site.a)
                assert torch.equal(pool.b[0][rows], site.b)

    @invariant()
    def nothing_overlaps_and_budgets_hold(self):
        pool = self.manager.pool
        spans = [(int(s), int(s) + padded(int(r))) for s, r in zip(pool.rank_start, pool.rank, strict=True) if r]
        taken = [rank for start, stop in spans for rank in range(start, stop)]
        assert len(taken) == len(set(taken))
        assert max(taken, default=0) < RANKS
        stats = self.manager.stats()
        assert all(used <= budget for used, budget in stats.bytes.values())
        pinned = [record for record in self.manager.records.values() if record.pinned]
        assert sum(padded(record.rank) for record in pinned if record.state is ACTIVE) <= RANKS

    @invariant()
    def the_books_are_right(self):
        manager, records = self.manager, self.manager.records
        states = [record.state for record in records.values()]
        assert manager.stats().by_state == {state.value: states.count(state) for state in AdapterState}
        by_alias = list(manager._alias_holds.values())
        for key, record in records.items():
            mine = self.holders.of(key)
            assert record.leases == sum(s.lease is not None for s in mine)
            wholes = [whole for whole in record.wholes.values() if whole.holds]
            assert record.holds == len(mine) + by_alias.count(record) + len(wholes)
            assert all(records[whole.key] is whole for whole in record.wholes.values())
            assert all(part.wholes[key] is record for part, _ in record.parts)
            assert not record.parts or record.retired or not any(part.retired for part, _ in record.parts)
        assert manager.held == len(self.holders.all)
        for name in manager.names():
            assert manager.records[manager.show(name).key].entry.name == name
        current = {record.key for record in manager.revisions.current.values()}
        candidates = {record.key for record in manager.revisions._candidates.values()}
        rest = [records[key] for key in records.keys() - current - candidates]
        assert all(record.retired or record.parts for record in rest)
        assert all(not record.ends or record.key in manager.revisions._ending for record in rest)

    def teardown(self):
        """Every holder gets its adapter or an error; then everything is unloaded, and nothing is left."""
        if not hasattr(self, "holders"):
            return
        for holder in self.holders.all:
            self.holders.pause(holder)
        for alias in ALIASES:
            self.manager.unalias(alias)
        for name in self.manager.names():
            self.manager.unpin(name)
        for _ in range(200):
            if not self.holders.all:
                break
            holder = self.holders.all[0]
            self.manager.request(holder.key)
            self.loader.run()
            self.bench.arrive()
            self.holders.take_in(self.manager.poll())
            if self.holders.all and self.holders.all[0] is holder and self.bench.state(holder.key) is ACTIVE:
                self.holders.end(holder)
        assert not self.holders.all, "a request that never ends"
        for name in self.manager.names():
            self.manager.unload(name)
        self.bench.settle()
        assert not self.manager.records
        assert not self.manager.pool.rank.any()
        assert self.manager.stats().bytes["device"][0] == self.manager.stats().bytes["host"][0] == 0


Life.TestCase.settings = examples(40, stateful_step_count=50)
TestLife = Life.TestCase
