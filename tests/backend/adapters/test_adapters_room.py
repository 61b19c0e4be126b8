# SPDX-License-Identifier: Apache-2.0
"""Room for ranks and for extras: an adapter has both or neither, and whoever is evicted made room that was needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import adapter_bench
from adapter_bench import SITE, Bench
from multilora_backend.adapters.extras import ExtraSpec, affine_spec, allocate_extras
from multilora_backend.adapters.layout import AdapterWeights
from multilora_backend.adapters.ranks import padded
from multilora_backend.adapters.room import GRAIN_BYTES, Room, extras_can_ever_fit
from multilora_backend.adapters.state import AdapterState
from profiles import examples

NAMES = [f"a{i}" for i in range(8)]
RANKS, GRAINS = 48, 6
sizes = st.tuples(st.integers(1, 20), st.integers(0, 3 * GRAIN_BYTES))


class Rooms(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.room = Room(RANKS, GRAINS * GRAIN_BYTES + 100)
        self.held: dict[str, tuple[int, int]] = {}

    @rule(
        name=st.sampled_from(NAMES),
        size=sizes,
        idle=st.sets(st.sampled_from(NAMES)),
        fixed=st.sets(st.sampled_from(NAMES)),
    )
    def claim(self, name, size, idle, fixed):
        if name in self.held:
            return
        rank, extras = size
        place = self.room.claim(name, rank, extras)
        ages = {held: float(held[1:]) for held in idle & self.held.keys()}
        if place is None:
            room = self.room.clear_for(rank, extras, ages, fixed)
            if room is None:
                for idle_name in ages:
                    self.evict(idle_name)
                assert self.room.claim(name, rank, extras) is None, "evicting all of them would have helped"
                return
            assert room.evict or room.shifts or room.extras_shifts
            assert len(set(room.evict)) == len(room.evict)
            for victim in room.evict:
                assert victim in ages
                self.evict(victim)
            for shift in room.shifts:
                assert shift.name not in fixed
                self.room.move(shift.name, shift.start)
            for shift in room.extras_shifts:
                assert shift.name not in fixed
                self.room.move_extras(shift.name, shift.start)
            place = self.room.claim(name, rank, extras)
            assert place is not None, "those were to be enough"
        self.held[name] = size
        assert self.room.holds(name, rank, extras)
        assert not self.room.holds(name, rank + 1, extras)
        assert not self.room.holds(name, rank, extras + GRAIN_BYTES)

    def evict(self, name):
        self.room.free(name)
        del self.held[name]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        self.evict(data.draw(st.sampled_from(sorted(self.held))))

    @invariant()
    def nothing_overlaps(self):
        ranks: set[int] = set()
        grains: set[int] = set()
        slots = set()
        for name, (rank, extras) in self.held.items():
            place = self.room.get(name)
            own = set(range(place.rank_start, place.rank_start + padded(rank)))
            assert not ranks & own
            assert max(own) < RANKS
            ranks |= own
            slots.add(place.slot)
            start = self.room.extras_start(name)
            assert start % GRAIN_BYTES == 0
            own = set(range(start // GRAIN_BYTES, -(-(start + extras) // GRAIN_BYTES))) if extras else set()
            assert not grains & own
            assert max(own, default=0) < GRAINS
            grains |= own
        assert len(slots) == len(self.held)
        assert self.room.extras_nbytes == len(grains) * GRAIN_BYTES


TestRooms = Rooms.TestCase
TestRooms.settings = examples(30, stateful_step_count=30)


def test_without_an_arena_nothing_with_extras_fits():
    room = Room(RANKS, 0)
    assert room.claim("a", 8, 1) is None
    assert room.clear_for(8, 1, {}) is None
    assert room.claim("b", 8) is not None
    assert not extras_can_ever_fit(1, GRAIN_BYTES - 1)
    assert extras_can_ever_fit(GRAIN_BYTES, GRAIN_BYTES)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Adapters x, y and z have a grain of extras each, w two, and the device holds two; p and q have none."""
    plain = adapter_bench.weights_of

    def weights_of(name: str, rank: int, pin: bool = False) -> AdapterWeights:
        weights = plain(name, rank, pin)
        if name not in "wxyz":
            return weights
        shape = (2, GRAIN_BYTES // 4) if name == "w" else (2, 2)
        extras = allocate_extras([ExtraSpec(affine_spec(SITE).key, shape, torch.float32)], pin)
        extras.tensors[affine_spec(SITE).key].fill_(float(ord(name)))
        return AdapterWeights(weights.version, rank, weights.sites, weights.buffers, False, extras)

    monkeypatch.setattr(adapter_bench, "weights_of", weights_of)
    contents = dict.fromkeys("wxyzpq", 8)
    return Bench(contents, ranks=32, extras_bytes=2 * GRAIN_BYTES)


def gains(bench: Bench, slot: int) -> list[float]:
    extras = bench.manager.pool.extras
    start = int(extras.offsets(0)[slot])
    assert start == extras.where[0, slot]
    return extras.values(torch.float32)[4 * start : 4 * start + 4].tolist()


def test_extras_come_with_their_adapter_and_go_with_it(bench: Bench):
    manager, extras = bench.manager, bench.manager.pool.extras
    manager.check_all()
    bench.land()  # ranks are known from here on
    bench.activate("x", "p", "y")
    leases = {name: manager.lease(name) for name in "xpy"}
    assert gains(bench, leases["x"].slot) == [float(ord("x"))] * 4
    assert gains(bench, leases["y"].slot) == [float(ord("y"))] * 4
    assert extras.used_by([leases["x"].slot, leases["p"].slot]).tolist() == [True]
    assert extras.used_by([leases["p"].slot]) is None
    assert manager.records["x"].nbytes == manager.records["p"].nbytes + 16

    # Room for ranks is left, but the arena is leased: z waits, and q, which has no extras, does not.
    assert bench.state("z") is AdapterState.COLD
    manager.request("z")
    bench.land()  # now its size is known
    assert manager.request("z") is AdapterState.COLD
    assert manager.waits_for_room("z")
    assert manager.request("q") is AdapterState.LOADING
    assert not manager.waits_for_room("q")
    bench.land()
    assert bench.state("q") is AdapterState.ACTIVE
    manager.release(leases["y"])
    assert not manager.waits_for_room("z")
    manager.release(leases["p"])
    bench.activate("z")
    assert bench.state("y") is AdapterState.COLD, "one of those that have extras goes"
    assert {"x", "z"} <= set(manager.resident())
    assert gains(bench, manager.lease("z").slot) == [float(ord("z"))] * 4
    assert gains(bench, leases["x"].slot) == [float(ord("x"))] * 4


def test_the_arena_is_moved_together_around_what_is_in_use(bench: Bench):
    bench = Bench(dict.fromkeys("wxyz", 8), ranks=40, extras_bytes=3 * GRAIN_BYTES)
    bench.activate("x", "y", "z")
    lease = bench.manager.lease("y")
    extras = bench.manager.pool.extras
    before = int(extras.where[0, lease.slot])
    assert before > 0
    bench.activate("w")
    assert set(bench.manager.resident()) == {"y", "w"}, "the grains of x and z are not side by side"
    assert int(extras.where[0, lease.slot]) != before
    assert gains(bench, lease.slot) == [float(ord("y"))] * 4
    start = int(extras.where[0, bench.manager.lease("w").slot]) * 4
    assert (extras.values(torch.float32)[start : start + GRAIN_BYTES // 2] == float(ord("w"))).all()


def test_pinned_extras_refuse_what_does_not_fit_beside_them(bench: Bench):
    bench.activate("x", "y")
    records, pins = bench.manager.records, bench.manager._life.residency.pins
    for name in "xy":
        pins.check(records[name])
        pins.add(records[name])
    records["z"].rank, records["z"].extras_bytes = 8, 16
    assert pins.excess(records["z"]) == (
        "z cannot be pinned: it needs 4096 bytes, and of the 8192 of adapter_extras_bytes 8192 are pinned"
    )
    assert "pinned adapters leave 0 of adapter_extras_bytes" in pins.in_the_way(records["z"])
    records["z"].extras_bytes = 0
    assert not pins.in_the_way(records["z"])


def test_an_adapter_without_extras_inherits_none_of_its_slot(bench: Bench):
    bench.activate("x")
    slot = bench.manager.lease("x").slot
    pool = bench.manager.pool
    pool.clear(slot)
    assert pool.extras.used_by([slot]) is None
    pool.write(adapter_bench.weights_of("p", 8), slot, 0)
    assert pool.extras.used_by([slot]) is None
    assert int(pool.extras.offsets(0)[slot]) < 0, "nor does the table on the device name any"


def test_extras_that_can_never_fit_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    small = Bench({"x": 8}, ranks=32, extras_bytes=GRAIN_BYTES - 16)
    small.manager.request("x")
    assert small.land() == ["x"]
    reason = small.manager.records["x"].reason
    assert reason == f"what it has besides A and B needs adapter_extras_bytes of 16; they are {GRAIN_BYTES - 16}"
