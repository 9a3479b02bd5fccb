"""The laws of writing and of freezing, watched at the moment of each data write and of each checkpoint."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import NamedTuple

import pytest

from lmdbitmap import schema, session
from lmdbitmap.device import FileDevice
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import Buffer
from lmdbitmap.lane import FilterLane
from tests.support import PATIENCE_SECONDS, make_raw_image
from tests.tracked import NAME, TrackedDisk, blocks_of, quick_folder, trust_of

BLOCK = 4096
BLOCKS = 5000
"""Two regions."""
CHECKPOINTS = 30
GEOMETRY = Geometry(BLOCKS * BLOCK, 12)


class TappedDevice(FileDevice):
    """The image, with somebody who looks on before each change of its data."""

    before_change: Callable[[int, int], None] = staticmethod(lambda offset, length: None)

    @property
    def fd(self) -> None:
        """None, so that every write comes by here."""

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.before_change(offset, len(data))
        os.pwrite(self._fd, data, offset)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self.before_change(offset, length)
        super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def discard(self, offset: int, length: int) -> None:
        self.before_change(offset, length)
        super().discard(offset, length)


@pytest.fixture
def tracked() -> Iterator[TrackedDisk]:
    with quick_folder() as folder, closing(TrackedDisk(folder, GEOMETRY.size).clean()) as tracked:
        yield tracked


def attach_tapped(tracked: TrackedDisk, max_armed: int = 1024) -> Filter:
    return Filter.attach(
        tracked.store, NAME, open_device=TappedDevice.open, max_armed=max_armed, background=False
    )


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


# --- law 1 ---


class Witness:
    """Looks up, at each change of data, whether a fresh view of the store calls its blocks dirty."""

    def __init__(self, tracked: TrackedDisk) -> None:
        self.tracked = tracked
        self.changes = 0
        self.breaches: list[tuple[int, int]] = []

    def __call__(self, offset: int, length: int) -> None:
        self.changes += 1
        if not set(GEOMETRY.blocks_outward(offset, length)) <= self.tracked.stored_dirt():
            self.breaches.append((offset, length))


@pytest.mark.parametrize("max_armed", [0, 3, 1024])
def test_no_data_is_written_before_its_dirt_is_durable(tracked: TrackedDisk, max_armed: int) -> None:
    chosen = random.Random(max_armed)
    disk = attach_tapped(tracked, max_armed)
    witness = Witness(tracked)
    disk.device.before_change = witness  # type: ignore[attr-defined]

    def place() -> tuple[int, int]:
        length = chosen.choice([1, 100, BLOCK, BLOCK + 1, 70 * BLOCK])
        return chosen.randrange(GEOMETRY.size - length), length

    steps: list[Callable[[], object]] = [
        lambda: disk.pwrite(bytes(100), place()[0]),
        lambda: disk.pwrite(bytes(65 * BLOCK), place()[0] % (GEOMETRY.size - 65 * BLOCK)),
        lambda: disk.lane().write_many([(place()[0], memoryview(b"x")) for _ in range(10)]),
        lambda: disk.write_zeroes(*place()),
        lambda: disk.discard(*place()),
        lambda: disk.background_pass(),
        lambda: disk.checkpoint(f"c{witness.changes}-{chosen.random()}"),
        disk.persist,
    ]
    for number in range(400):
        steps[chosen.choice([0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7]) if number else 0]()
    assert witness.breaches == []
    assert witness.changes > 400
    disk.detach()


def test_law_holds_for_the_system_call_of_the_fast_way_too(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the image has a descriptor, lanes call pwrite themselves."""
    witness = Witness(tracked)
    pwrite, image = os.pwrite, tracked.image.stat()

    def watched(fd: int, data: Buffer, offset: int) -> int:
        if os.path.samestat(os.fstat(fd), image):
            witness(offset, len(data))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    disk = tracked.attach(max_armed=4)
    chosen = random.Random(1)
    for number in range(300):
        offset = chosen.randrange(GEOMETRY.size - BLOCK)
        disk.pwrite(bytes(BLOCK), offset)
        disk.pwrite(bytes(10), offset)
        if number % 50 == 0:
            disk.checkpoint(str(number))
        if number % 7 == 0:
            disk.background_pass()
    assert witness.breaches == []
    assert witness.changes == 600
    disk.detach()


def test_law_holds_for_many_threads_and_the_passes_between_them(tracked: TrackedDisk) -> None:
    disk = attach_tapped(tracked, max_armed=5)
    witness = Witness(tracked)
    disk.device.before_change = witness  # type: ignore[attr-defined]
    done = threading.Event()

    def write(seed: int) -> None:
        lane, chosen = disk.lane(), random.Random(seed)
        for _ in range(60):
            lane.pwrite(bytes(10), chosen.randrange(GEOMETRY.size - 10))
            lane.write_many([(chosen.randrange(GEOMETRY.size - 10), memoryview(b"x")) for _ in range(3)])

    def pass_over() -> None:
        while not done.wait(0.001):
            disk.background_pass()
            disk.persist()

    writers = [start(partial(write, seed)) for seed in range(4)]
    passer = start(pass_over)
    join(*writers)
    done.set()
    join(passer)
    assert witness.breaches == []
    assert witness.changes == 4 * 60 * 4
    disk.detach()


# --- law 2 ---


class Turnstile:
    """Holds every data write between its mark and its data until it is let go."""

    def __init__(self) -> None:
        self.arrived, self.go_on = threading.Event(), threading.Event()

    def __call__(self, offset: int, length: int) -> None:
        self.arrived.set()
        assert self.go_on.wait(PATIENCE_SECONDS)


WRITES: dict[str, Callable[[FilterLane], object]] = {
    "write": lambda lane: lane.pwrite(b"late", 0),
    "batch": lambda lane: lane.write_many([(0, memoryview(b"late"))]),
    "zeroes": lambda lane: lane.write_zeroes(0, 4),
    "discard": lambda lane: lane.discard(0, 4),
}


@pytest.mark.parametrize("settled", [True, False], ids=["settled before", "new dirt"])
@pytest.mark.parametrize("kind", list(WRITES))
def test_checkpoint_waits_for_a_write_between_its_mark_and_its_data(
    tracked: TrackedDisk, kind: str, settled: bool
) -> None:
    disk = attach_tapped(tracked)
    if settled:
        disk.pwrite(b"first", 0)
    turnstile = Turnstile()
    disk.device.before_change = turnstile  # type: ignore[attr-defined]
    lane = disk.lane()
    order: list[str] = []

    def write() -> None:
        WRITES[kind](lane)
        order.append("written")

    def checkpoint() -> None:
        disk.checkpoint("monday")
        order.append("checkpoint")

    writer = start(write)
    assert turnstile.arrived.wait(PATIENCE_SECONDS)
    checkpointer = start(checkpoint)
    while lane.size >= 0:  # until the checkpoint closes the gate
        assert checkpointer.is_alive()
    assert "monday" not in tracked.checkpoints()
    turnstile.go_on.set()
    join(writer, checkpointer)
    assert tracked.checkpoints()[-1] == "monday"
    assert blocks_of(disk.changes(since="start", until="monday")) == {0}
    assert blocks_of(disk.changes(since="monday")) == set()
    disk.detach()


def test_write_that_comes_during_a_checkpoint_counts_for_the_new_period(tracked: TrackedDisk) -> None:
    disk = tracked.attach()
    disk.pwrite(b"first", 0)
    update = tracked.store.update
    writers: list[threading.Thread] = []

    def commit_beside_a_writer(change: Callable[..., object]) -> object:
        """Called with the gate closed; the writer can get no further before the checkpoint is there."""
        tracked.store.update = update  # type: ignore[method-assign]
        writers.append(start(lambda: disk.pwrite(b"second", 0)))
        return update(change)

    tracked.store.update = commit_beside_a_writer  # type: ignore[method-assign, assignment]
    disk.checkpoint("monday")
    join(*writers)
    assert len(writers) == 1
    assert disk.pread(6, 0) == b"second"
    assert blocks_of(disk.changes(since="monday")) == {0}
    disk.detach()


class Written(NamedTuple):
    """A block that was written between two looks at the number of the last checkpoint."""

    disk: int
    block: int
    before: int
    after: int


class Crowd:
    """Threads that write to two disks of one store as fast as they can, and one that passes over them."""

    def __init__(self, tracked: TrackedDisk) -> None:
        image = make_raw_image(tracked.folder / "other.raw", GEOMETRY.size)
        session.add(
            tracked.store, "sdb", str(image), granularity_bits=12, durability=tracked.disk().durability
        )
        self.disks = [tracked.attach(), Filter.attach(tracked.store, "sdb", background=False)]
        self.written: list[Written] = []
        self.stop = threading.Event()
        self.checkpoint(0)

    def write(self, seed: int) -> None:
        chosen = random.Random(seed)
        lanes = [disk.lane() for disk in self.disks]
        while not self.stop.is_set():
            which, block, before = chosen.randrange(2), chosen.randrange(BLOCKS), self.last_checkpoint
            if seed % 2:
                lanes[which].pwrite(b"x", block * BLOCK)
            else:
                assert lanes[which].write_many([(block * BLOCK, memoryview(b"x"))]) == {}
            self.written.append(Written(which, block, before, self.last_checkpoint))

    def pass_over(self) -> None:
        while not self.stop.wait(0.002):
            for disk in self.disks:
                disk.background_pass()
                disk.persist()

    def await_writes(self, count: int) -> None:
        wanted, deadline = len(self.written) + count, time.monotonic() + PATIENCE_SECONDS
        while len(self.written) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    def checkpoint(self, number: int) -> None:
        take_checkpoint(self.disks, f"c{number}")
        self.last_checkpoint = number

    def dirty_by_period(self, which: int) -> list[set[int]]:
        found = []
        for number in range(self.last_checkpoint):
            answer = self.disks[which].changes(since=f"c{number}", until=f"c{number + 1}")
            assert trust_of(answer) is Trust.EXACT
            found.append(blocks_of(answer))
        return found

    def close(self) -> None:
        self.stop.set()
        for disk in self.disks:
            disk.detach()


@pytest.mark.parametrize("durability", schema.DURABILITIES)
def test_every_write_is_dirty_in_the_period_in_which_it_completes(durability: str) -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(quick_folder())
        tracked = stack.enter_context(closing(TrackedDisk(folder, GEOMETRY.size, durability=durability)))
        crowd = stack.enter_context(closing(Crowd(tracked)))
        threads = [start(partial(crowd.write, seed)) for seed in range(4)] + [start(crowd.pass_over)]
        for number in range(1, CHECKPOINTS):
            crowd.await_writes(20)
            crowd.checkpoint(number)
        crowd.stop.set()
        join(*threads)
        crowd.checkpoint(CHECKPOINTS)
        dirty = [crowd.dirty_by_period(which) for which in range(2)]
    assert len(crowd.written) >= 20 * (CHECKPOINTS - 1)
    for which, block, before, after in crowd.written:
        # a checkpoint's number is told only after it was taken: the write may be in the period after `after`
        assert any(block in part for part in dirty[which][before : after + 2])
    named = [set().union(*parts) for parts in dirty]
    assert named == [{block for disk, block, *_ in crowd.written if disk == which} for which in range(2)]
