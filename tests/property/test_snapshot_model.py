"""Snapshots beside plain copies of the image, compared after every step of anything that may happen to a disk.

They are read through themselves, and from the image as another process does, with a guest that writes between the
steps of that. Of some nothing is read twice: what was read of those is compared once.
"""

from __future__ import annotations

import random
from contextlib import ExitStack, closing
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmdbitmap.errors import Busy
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.snapshot import Snapshot
from tests.helpers.directly import STEPS, directly
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

SIZES = [10_000, 70_000, 1_000_000]


@dataclass
class Held:
    snapshot: Snapshot
    truth: bytes
    unread: list[int] | None
    """Clusters that are to be read yet, of one of which nothing is read twice."""


class SnapshotMachine(RuleBasedStateMachine):
    """A disk with small blocks or large ones, and up to three snapshots at once."""

    granularity_bits = 12

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        folder = self._stack.enter_context(quick_folder())
        self.tracked = TrackedDisk(folder, 300_000, granularity_bits=self.granularity_bits).clean()
        self._stack.enter_context(closing(self.tracked))
        self.disk = self.tracked.attach(max_armed=4)
        self.scratch = Scratch(str(folder))
        self.held: list[Held] = []
        self.points = 0
        self.chosen = random.Random(0)

    def teardown(self) -> None:
        self.disk.detach()
        self._stack.close()

    def image(self) -> bytes:
        return self.tracked.image.read_bytes()

    def place(self, at: float, length: int) -> tuple[int, int]:
        offset = int(at * self.disk.size)
        return offset, min(length, self.disk.size - offset)

    @precondition(lambda self: len(self.held) < 3)
    @rule(once=st.booleans())
    def take(self, once: bool) -> None:
        self.points += 1
        snapshot = self.disk.snapshot(f"s{self.points}", self.scratch)
        if once:
            snapshot.read_once()
        assert snapshot.checkpoint is not None
        assert snapshot.checkpoint.name == f"s{self.points}"
        unread = list(range(snapshot.clusters.block_count)) if once else None
        self.held.append(Held(snapshot, self.image(), unread))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 2))
    def release(self, which: int) -> None:
        self.held.pop(which % len(self.held)).snapshot.release()

    @rule(at=st.floats(0, 1), length=st.sampled_from([1, 511, 4096, 5000, 70_000]))
    def write(self, at: float, length: int) -> None:
        offset, length = self.place(at, length)
        self.disk.pwrite(self.chosen.randbytes(length), offset)

    @precondition(lambda self: self.held)
    @rule(
        which=st.integers(0, 2),
        at=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3),
        length=st.sampled_from([1, 4096, 30_000, 200_000]),
        meanwhile=st.lists(st.sampled_from([*STEPS, None]), max_size=3),
    )
    def read_the_image(self, which: int, at: list[float], length: int, meanwhile: list[str | None]) -> None:
        """Some ranges at once, as another process does; before some of its steps the guest writes there."""
        held = self.held[which % len(self.held)]
        ranges = [part for one in at for part in self.unread_part(held, one, length)]
        overwritten = self.chosen.choice(ranges) if ranges else (0, 0)

        def write(next_step: str) -> None:
            if next_step in meanwhile:
                offset = overwritten[0] + self.chosen.randrange(overwritten[1] + 1) // 2
                self.disk.pwrite(self.chosen.randbytes(min(600, held.snapshot.size - offset)), offset)

        parts = [(bytearray(size), offset) for offset, size in ranges]
        with closing(directly(held.snapshot, self.tracked.image, write)) as device:
            device.pread_many([(memoryview(data), offset) for data, offset in parts])
        for data, offset in parts:
            assert data == held.truth[offset : offset + len(data)]

    def unread_part(self, held: Held, at: float, length: int) -> list[tuple[int, int]]:
        """A range (offset, length), in whole clusters and not for a second time where nothing is read twice."""
        size = held.snapshot.size
        if held.unread is None:
            offset = int(at * size)
            return [(offset, min(length, size - offset))]
        if not held.unread:
            return []
        clusters = held.snapshot.clusters
        index = int(at * len(held.unread))
        first, count = held.unread[index], 1
        most = max(length >> clusters.granularity_bits, 1)
        while count < most and held.unread[index : index + count + 1][-1] == first + count:
            count += 1
        del held.unread[index : index + count]
        return [clusters.bytes_of(first, first + count)]

    @rule(at=st.lists(st.floats(0, 1), min_size=1, max_size=5))
    def write_many(self, at: list[float]) -> None:
        places = [self.place(one, 600) for one in at]
        writes = [(offset, memoryview(self.chosen.randbytes(length))) for offset, length in places if length]
        assert self.disk.lane().write_many(writes) == {}

    @rule(at=st.floats(0, 1), length=st.sampled_from([1, 4096, 100_000]), discard=st.booleans())
    def zero(self, at: float, length: int, discard: bool) -> None:
        (self.disk.discard if discard else self.disk.write_zeroes)(*self.place(at, length))

    @rule(at=st.floats(0, 1))
    def mark(self, at: float) -> None:
        self.disk.mark(*self.place(at, 5000))

    @rule(size=st.sampled_from(SIZES))
    def resize(self, size: int) -> None:
        if self.held:
            with pytest.raises(Busy):
                self.disk.resize(size)
        else:
            self.disk.resize(size)

    @rule()
    def checkpoint(self) -> None:
        self.points += 1
        self.disk.checkpoint(f"c{self.points}")

    @rule()
    def begin_a_new_epoch(self) -> None:
        self.disk.start_epoch("by lot")

    @rule()
    def pass_over(self) -> None:
        self.disk.background_pass()

    @invariant()
    def every_snapshot_reads_as_the_image_did(self) -> None:
        for held in self.held:
            assert held.snapshot.broken is None
            if held.unread is None:
                assert held.snapshot.pread(len(held.truth), 0) == held.truth

    @invariant()
    def what_is_called_zero_was_zero(self) -> None:
        for held in self.held:
            offset = 0
            for part in held.snapshot.allocation(0, held.snapshot.size):
                if part.zero:
                    assert not any(held.truth[offset : offset + part.length])
                offset += part.length
            assert offset == len(held.truth)

    @invariant()
    def the_bitmap_is_right_too(self) -> None:
        for held in self.held:
            assert held.snapshot.checkpoint is not None
            with self.tracked.store.read() as reader:
                disk = next(one for one in reader.disks() if one.name == NAME)
            if disk.epoch != held.snapshot.checkpoint.epoch:
                continue
            dirty = {
                byte
                for extent in self.disk.changes(since=held.snapshot.checkpoint.name).extents()
                for byte in range(extent.offset >> 9, (extent.offset + extent.length + 511) >> 9)
            }
            now, then = self.image(), held.truth
            for sector in range(0, min(len(now), len(then)), 512):
                if now[sector : sector + 512] != then[sector : sector + 512]:
                    assert sector >> 9 in dirty


class SmallBlocks(SnapshotMachine):
    granularity_bits = 9


class LargeBlocks(SnapshotMachine):
    granularity_bits = 18


@pytest.mark.parametrize("machine", [SnapshotMachine, SmallBlocks, LargeBlocks], ids=lambda one: one.__name__)
def test_snapshots_are_what_the_image_was(machine: type[SnapshotMachine]) -> None:
    case = machine.TestCase
    case.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
    case("runTest").runTest()
