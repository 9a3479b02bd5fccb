"""The laws of writing and of freezing, watched at the moment of each data write and of each checkpoint.

What many threads do to them at once is in crash/test_races.py.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import pytest

from lmdbitmap.filter import Filter
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import Buffer
from lmdbitmap.tracker.scratch import Scratch
from tests.crash.tapped import WRITES, TappedDevice, Turnstile, join, start
from tests.helpers.support import PATIENCE_SECONDS
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, quick_folder

BLOCK = 4096
BLOCKS = 5000
"""Two regions."""
GEOMETRY = Geometry(BLOCKS * BLOCK, 12)


@pytest.fixture
def tracked() -> Iterator[TrackedDisk]:
    with quick_folder() as folder, closing(TrackedDisk(folder, GEOMETRY.size).clean()) as tracked:
        yield tracked


def attach_tapped(tracked: TrackedDisk, max_armed: int = 1024) -> Filter:
    return Filter.attach(
        tracked.store, NAME, open_device=TappedDevice.open, max_armed=max_armed, background=False
    )


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


def test_law_holds_while_a_snapshot_is_held(tracked: TrackedDisk) -> None:
    """Lanes look at another map then: it lets nothing through that is not durably dirty."""
    disk, chosen = attach_tapped(tracked, max_armed=3), random.Random(2)
    witness = Witness(tracked)
    disk.device.before_change = witness  # type: ignore[attr-defined]
    snapshot = disk.snapshot("held", Scratch(str(tracked.folder)))
    for number in range(150):
        offset = chosen.randrange(40 * BLOCK)
        disk.pwrite(b"new", offset)
        disk.lane().write_many([(offset, memoryview(b"x"))])
        if number % 40 == 39:
            disk.checkpoint(f"c{number}")
        if number % 7 == 0:
            disk.background_pass()
    assert witness.breaches == []
    assert witness.changes == 300
    assert snapshot.pread(40 * BLOCK, 0) == bytes(40 * BLOCK)
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
