"""A disk held as it was: what is kept, what it costs, how it breaks, and that no reader sees a torn block."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap import bits
from lmdbitmap.errors import Busy, FormatError, InvalidArgument, NotFound, StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter, take_snapshot
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import Allocation, Buffer
from lmdbitmap.storage.schema import Checkpoint
from lmdbitmap.store import Writer
from lmdbitmap.tracker import points, tracking
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.snapshot import Snapshot
from tests.crash.tapped import WRITES, TappedDevice, Turnstile, join, start
from tests.helpers.support import PATIENCE_SECONDS, make_raw_image
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, quick_folder, trust_of

BLOCK = 4096
BLOCKS = 500
SIZE = BLOCKS * BLOCK
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def tracked(folder: Path) -> Iterator[TrackedDisk]:
    with closing(TrackedDisk(folder, SIZE).clean()) as tracked:
        tracked.image.write_bytes(OLD * BLOCKS)
        with tracked.attach() as disk:  # of a new epoch
            disk.checkpoint("written")
        yield tracked


@pytest.fixture
def disk(tracked: TrackedDisk) -> Iterator[Filter]:
    with tracked.attach() as disk:
        yield disk


def scratch(folder: Path, blocks: int = BLOCKS) -> Scratch:
    return Scratch(str(folder), blocks * BLOCK)


def test_old_data_is_read_after_new_data_was_written(disk: Filter, folder: Path) -> None:
    snapshot = disk.snapshot("s", scratch(folder))
    disk.pwrite(NEW, 3 * BLOCK)
    assert disk.pread(BLOCK, 3 * BLOCK) == NEW
    assert snapshot.pread(3 * BLOCK, 2 * BLOCK) == OLD * 3
    assert snapshot.kept_bytes == BLOCK


def test_old_data_is_read_into_a_view_of_larger_items(disk: Filter, folder: Path) -> None:
    """Its length is not in bytes: what lay beyond that was read from the image, whatever was kept of it."""
    snapshot = disk.snapshot("s", scratch(folder))
    disk.pwrite(NEW, 3 * BLOCK)
    buffer = bytearray(4 * BLOCK)
    snapshot.pread_into(memoryview(buffer).cast("I"), 0)
    assert buffer == OLD * 4


def test_a_block_is_kept_once(disk: Filter, folder: Path) -> None:
    snapshot = disk.snapshot("s", scratch(folder))
    for number in range(5):
        disk.pwrite(NEW, 0)
        disk.checkpoint(f"c{number}")
    assert snapshot.kept_bytes == BLOCK
    assert snapshot.pread(BLOCK, 0) == OLD


def test_new_epoch_in_which_everything_is_dirty_hides_nothing_from_it(disk: Filter, folder: Path) -> None:
    """There the first write to a region settles all of it."""
    snapshot = disk.snapshot("s", scratch(folder))
    disk.start_epoch("by intent")
    for block in range(3):
        disk.pwrite(NEW, block * BLOCK)
    assert snapshot.pread(3 * BLOCK, 0) == OLD * 3


def test_zeroes_take_no_room(disk: Filter, folder: Path) -> None:
    disk.write_zeroes(0, 10 * BLOCK)
    disk.pwrite(bytes(BLOCK), 20 * BLOCK)
    snapshot = disk.snapshot("s", scratch(folder))
    disk.pwrite(NEW * 10, 0)
    disk.pwrite(NEW, 20 * BLOCK)
    assert snapshot.kept_bytes == 0
    assert snapshot.pread(BLOCK, 20 * BLOCK) == bytes(BLOCK)


def test_a_write_does_not_wait_for_the_file_system_to_look_for_holes(
    disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To say where data ends some read all of it; only where much is overwritten a hole may save more than that."""
    snapshot, allocation = disk.snapshot("s", scratch(folder)), disk.device.allocation
    asked: list[int] = []

    def note(offset: int, length: int) -> Iterator[Allocation]:
        asked.append(length)
        return allocation(offset, length)

    monkeypatch.setattr(disk.device, "allocation", note)
    disk.pwrite(NEW * 9, 3 * BLOCK)
    assert asked == []
    disk.write_zeroes(0, SIZE)
    assert asked == [SIZE - 12 * BLOCK]
    assert snapshot.pread(SIZE, 0) == OLD * BLOCKS


def test_nothing_is_left_of_it_in_its_folder(disk: Filter, folder: Path) -> None:
    before = sorted(os.listdir(folder))
    snapshot = disk.snapshot("s", scratch(folder))
    disk.pwrite(NEW, 0)
    assert sorted(os.listdir(folder)) == before
    snapshot.release()


def test_the_disk_keeps_its_size_and_the_checkpoint_while_it_is_held(disk: Filter, folder: Path) -> None:
    snapshot = disk.snapshot("s", scratch(folder))
    with pytest.raises(Busy, match="held as at checkpoint 's'"):
        disk.resize(SIZE - BLOCK)
    with pytest.raises(Busy, match="held as at checkpoint 's'"):
        disk.forget("s")
    snapshot.release()
    disk.resize(SIZE - BLOCK)
    disk.forget("s")
    assert disk.size == SIZE - BLOCK


@pytest.mark.parametrize("later", [[], ["later"]], ids=["newest", "older"])
def test_checkpoint_that_is_held_in_the_last_moment_is_not_forgotten(
    tracked: TrackedDisk, disk: Filter, folder: Path, later: list[str]
) -> None:
    update = tracked.store.update

    def hold_first(change: Callable[[Writer], bool]) -> bool:
        tracked.store.update = update  # type: ignore[method-assign]
        disk.snapshot("s", scratch(folder))
        for name in later:
            disk.checkpoint(name)
        return update(change)

    tracked.store.update = hold_first  # type: ignore[method-assign, assignment]
    with pytest.raises(Busy, match="held as at checkpoint 's'"):
        disk.forget("s")
    assert tracked.checkpoints()[4:] == ["s", *later]


def test_a_disk_that_grows_in_the_last_moment_is_held_as_it_is_then(
    disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow_first(*how: Any) -> list[Checkpoint]:
        disk.resize(2 * SIZE)
        return take_points(*how)

    take_points = points._take_points
    monkeypatch.setattr(points, "_take_points", grow_first)
    snapshot = disk.snapshot("s", scratch(folder))
    disk.pwrite(NEW, SIZE)
    assert snapshot.size == 2 * SIZE
    assert snapshot.pread(BLOCK, SIZE) == bytes(BLOCK)


@pytest.mark.parametrize("change", ["checkpoint", "forget", "start_epoch", "snapshot"])
def test_chain_does_not_change_where_there_is_no_memory_to_hold_the_disk_meanwhile(
    tracked: TrackedDisk, disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Else the store would record into a new period, and writers would go by what was dirty in the old one."""

    def refuse(*arguments: Any) -> None:
        raise StorageError("memory", OSError(errno.ENOMEM, "none"), next_step="free some")

    changes: dict[str, Callable[[], object]] = {
        "checkpoint": lambda: disk.checkpoint("monday"),
        "forget": lambda: disk.forget("later"),
        "start_epoch": lambda: disk.start_epoch("a test"),
        "snapshot": lambda: disk.snapshot("monday", scratch(folder)),
    }
    snapshot = disk.snapshot("s", scratch(folder))
    disk.pwrite(NEW, 7 * BLOCK)
    disk.checkpoint("later")
    disk.pwrite(NEW, 8 * BLOCK)
    with monkeypatch.context() as patched:
        patched.setattr(tracking, "Holding", refuse)
        with pytest.raises(StorageError, match="none"):
            changes[change]()
    disk.pwrite(NEW, 8 * BLOCK)
    assert tracked.checkpoints() == ["epoch-1", "start", "epoch-2", "written", "s", "later"]
    assert (blocks_of(disk.changes()), trust_of(disk.changes())) == ({8}, Trust.EXACT)
    assert (disk.snapshots, snapshot.pread(BLOCK, 8 * BLOCK)) == ((snapshot,), OLD)


def test_a_snapshot_that_is_interrupted_when_it_is_held_is_let_go_of(
    disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else could release it, and its checkpoint could not be forgotten, nor the disk be resized."""

    def interrupted(self: tracking.Tracking) -> None:
        assert len(self.snapshots) == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tracking.Tracking, "stay", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.snapshot("s", scratch(folder))
    assert disk.snapshots == ()
    assert trust_of(disk.changes()) is Trust.UNTRUSTED


def test_a_snapshot_can_be_released_where_there_is_no_memory(
    disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the guest would keep old data for nobody. The other snapshot goes on with what both have kept."""

    def refuse(*arguments: Any) -> None:
        raise StorageError("memory", OSError(errno.ENOMEM, "none"), next_step="free some")

    one, two = disk.snapshot("one", scratch(folder)), disk.snapshot("two", scratch(folder))
    disk.pwrite(NEW, 0)
    monkeypatch.setattr(bits, "anonymous_memory", refuse)
    one.release()
    assert disk.snapshots == (two,)
    for block in (0, 1):
        disk.pwrite(b"x" * BLOCK, block * BLOCK)
    assert two.pread(2 * BLOCK, 0) == 2 * OLD
    two.release()
    assert not disk.snapshots


def test_writers_are_fast_again_after_the_release(disk: Filter, folder: Path) -> None:
    lane = disk.lane()
    snapshot = disk.snapshot("s", scratch(folder))
    assert lane.settled is not disk._tracking.period.settled
    snapshot.release()
    assert lane.settled is disk._tracking.period.settled
    assert disk.snapshots == ()


def test_nothing_of_what_was_released_waits_to_be_collected(disk: Filter, folder: Path) -> None:
    """The collector comes seldom to what has lived as long as a backup takes."""
    gc.disable()
    try:
        snapshot = disk.snapshot("s", scratch(folder))
        disk.pwrite(b"x", 0)
        there = weakref.ref(snapshot)
        snapshot.release()
        del snapshot
        assert there() is None
    finally:
        gc.enable()


def test_released_snapshot_tells_its_readers(disk: Filter, folder: Path) -> None:
    snapshot = disk.snapshot("s", scratch(folder))
    snapshot.release()
    snapshot.release()
    with pytest.raises(StorageError, match="released"):
        snapshot.pread(1, 0)
    with pytest.raises(StorageError, match="released"):
        list(snapshot.allocation(0, SIZE))


def test_a_read_that_an_interruption_left_counted_keeps_nobody_from_its_threads_release(
    disk: Filter, folder: Path
) -> None:
    """It can come right before the read is counted out. The reads of other threads are waited for all the same."""
    snapshot, other = disk.snapshot("s", scratch(folder)), -1

    def release() -> None:
        snapshot._readers.add(threading.get_ident())
        snapshot.release()

    snapshot._readers.add(other)
    releasing = threading.Thread(target=release, daemon=True)
    releasing.start()
    releasing.join(0.05)
    assert releasing.is_alive()
    with snapshot._lock:
        snapshot._readers.discard(other)
        snapshot._reading.notify_all()
    releasing.join(PATIENCE_SECONDS)
    assert not releasing.is_alive()


def test_a_read_in_the_middle_of_which_its_own_thread_releases_gives_no_data(
    disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal's handler may: from then on nothing is kept, and new data would pass for old."""
    snapshot = disk.snapshot("s", scratch(folder))
    read = snapshot._read_untouched

    def release_first(*where: Any) -> None:
        snapshot.release()
        read(*where)

    monkeypatch.setattr(snapshot, "_read_untouched", release_first)
    with pytest.raises(StorageError, match="released"):
        snapshot.pread(BLOCK, 0)


def test_detach_releases_it(tracked: TrackedDisk, folder: Path) -> None:
    with tracked.attach() as disk:
        snapshot = disk.snapshot("s", scratch(folder))
    with pytest.raises(StorageError, match="released"):
        snapshot.pread(1, 0)


def test_release_at_the_moment_of_the_detach_is_a_release(disk: Filter, folder: Path) -> None:
    snapshot, drained = disk.snapshot("s", scratch(folder)), disk._tracking.gate.drained

    def detach_first() -> AbstractContextManager[None]:
        disk._tracking.gate.drained = drained  # type: ignore[method-assign]
        disk.detach()
        return drained()

    disk._tracking.gate.drained = detach_first  # type: ignore[assignment, method-assign]
    snapshot.release()
    with pytest.raises(StorageError, match="released"):
        snapshot.pread(1, 0)


def test_it_cannot_be_written(disk: Filter, folder: Path) -> None:
    lane = disk.snapshot("s", scratch(folder)).lane()
    for kind, change in WRITES.items():
        if kind != "batch":
            with pytest.raises(OSError, match="read-only") as refusal:
                change(lane)  # type: ignore[arg-type]
            assert refusal.value.errno == errno.EPERM
    assert lane.write_many([(0, memoryview(b"x"))]) == {0: errno.EPERM}


def test_reads_past_the_end_are_refused(disk: Filter, folder: Path) -> None:
    snapshot = disk.snapshot("s", scratch(folder))
    with pytest.raises(InvalidArgument):
        snapshot.pread(2, SIZE - 1)


# --- many at once ---


def test_two_disks_are_held_at_one_moment_or_neither(tracked: TrackedDisk, folder: Path) -> None:
    from lmdbitmap.tracker import session

    other = make_raw_image(folder / "other.raw", SIZE)
    session.add(tracked.store, "sdb", str(other), granularity_bits=12)
    with tracked.attach() as first, Filter.attach(tracked.store, "sdb", background=False) as second:
        held = take_snapshot([first, second], "both", scratch(folder))
        assert [snapshot.disk.name for snapshot in held] == [NAME, "sdb"]
        with pytest.raises(NotFound):
            take_snapshot([first, second], "none", Scratch(str(folder / "missing")))
        assert "none" not in tracked.checkpoints()
        assert first.snapshots == (held[0],)


def test_unflushable_image_leaves_neither_checkpoint_nor_snapshot(
    tracked: TrackedDisk, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tracked.attach()

    def refuse() -> None:
        raise OSError(errno.EIO, "by intent")

    monkeypatch.setattr(disk.device, "flush", refuse)
    with pytest.raises(StorageError):
        disk.snapshot("s", scratch(folder))
    assert "s" not in tracked.checkpoints()
    assert disk.snapshots == ()
    disk.abandon()


# --- breaking ---


def test_full_scratch_file_breaks_the_snapshot_and_not_the_guest(disk: Filter, folder: Path) -> None:
    snapshot = disk.snapshot("s", scratch(folder, blocks=2))
    for block in range(3):
        disk.pwrite(NEW, block * BLOCK)
    assert disk.pread(3 * BLOCK, 0) == NEW * 3
    assert snapshot.broken is not None
    for block in (0, 2, 100):
        with pytest.raises(StorageError, match="full"):
            snapshot.pread(BLOCK, block * BLOCK)
    with pytest.raises(StorageError, match="full"):
        list(snapshot.allocation(0, SIZE))


def test_refused_scratch_file_breaks_the_snapshot(
    disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = disk.snapshot("s", scratch(folder))
    pwrite, image = os.pwrite, os.fstat(disk.device.fd or -1)

    def refuse(fd: int, data: Buffer, offset: int) -> int:
        if not os.path.samestat(os.fstat(fd), image):
            raise OSError(errno.ENOSPC, "by intent")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    disk.pwrite(NEW, 0)
    assert disk.pread(BLOCK, 0) == NEW
    assert snapshot.broken is not None
    assert "by intent" in snapshot.broken


@pytest.mark.parametrize("preallocate", [False, True])
def test_last_space_of_a_file_system_is_left_to_the_guest(
    disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch, preallocate: bool
) -> None:
    """The image may grow there. What was taken before is not asked for."""
    snapshot = disk.snapshot("s", Scratch(str(folder), SIZE, preallocate))
    disk.pwrite(NEW, 0)
    assert snapshot.broken is None
    full = list(os.statvfs(folder))
    full[4] = full[2] // 100 - 1  # available, of all blocks
    monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result(full))
    disk.pwrite(NEW, BLOCK)
    assert disk.pread(2 * BLOCK, 0) == NEW * 2
    assert (snapshot.broken is None) == preallocate
    assert preallocate or "is left to the guest and the store" in (snapshot.broken or "")


def test_nothing_is_kept_of_what_is_not_wanted(disk: Filter, folder: Path) -> None:
    snapshot = disk.snapshot("s", scratch(folder, blocks=1))
    snapshot.want_only([(7, 8)], Geometry(SIZE, 12))
    disk.pwrite(NEW * 10, 0)
    disk.write_zeroes(50 * BLOCK, 100 * BLOCK)
    assert snapshot.pread(BLOCK, 7 * BLOCK) == OLD
    assert snapshot.kept_bytes == BLOCK
    with pytest.raises(InvalidArgument, match="not kept"):
        snapshot.pread(2 * BLOCK, 7 * BLOCK)


def test_nothing_is_kept_of_what_was_read_and_will_not_be_again(disk: Filter, folder: Path) -> None:
    snapshot = disk.snapshot("s", scratch(folder))
    snapshot.read_once()
    assert snapshot.pread(10 * BLOCK, 0) == OLD * 10
    assert snapshot.pread(BLOCK - 1, 10 * BLOCK) == OLD[1:]
    disk.pwrite(NEW * 12, 0)
    assert snapshot.kept_bytes == 2 * BLOCK
    assert snapshot.pread(2 * BLOCK, 10 * BLOCK) == OLD * 2
    with pytest.raises(InvalidArgument, match="not any more"):
        snapshot.pread(1, 9 * BLOCK)


def test_what_is_not_wanted_is_not_called_zero(disk: Filter, folder: Path) -> None:
    """A block that held data then, and is a hole in the image now."""
    snapshot = disk.snapshot("s", scratch(folder))
    snapshot.want_only([(7, 8)], Geometry(SIZE, 12))
    disk.discard(50 * BLOCK, BLOCK)
    assert not any(part.zero for part in snapshot.allocation(0, SIZE))


def test_image_that_cannot_be_read_breaks_the_snapshot_and_not_the_guest(
    tracked: TrackedDisk, folder: Path
) -> None:
    """Whatever it says: an NBD server may also talk nonsense."""

    class LyingDevice(TappedDevice):
        def pread_into(self, buffer: memoryview, offset: int) -> None:
            raise FormatError("far image", expected="a reply", found="none", next_step="mend the server")

    with Filter.attach(tracked.store, NAME, open_device=LyingDevice.open, background=False) as disk:
        snapshot = disk.snapshot("s", scratch(folder))
        disk.pwrite(NEW, 0)
        assert snapshot.broken is not None
        assert "expected a reply" in snapshot.broken
        assert disk.pread(BLOCK, 0) == NEW


def test_want_of_memory_breaks_the_snapshot_and_not_the_guest(tracked: TrackedDisk, folder: Path) -> None:
    class StarvingDevice(TappedDevice):
        def pread_into(self, buffer: memoryview, offset: int) -> None:
            raise MemoryError

    with Filter.attach(tracked.store, NAME, open_device=StarvingDevice.open, background=False) as disk:
        snapshot = disk.snapshot("s", scratch(folder))
        disk.pwrite(NEW, 0)
        assert snapshot.broken == "the snapshot broke: old data could not be kept (no memory is left)"
        assert disk.pread(BLOCK, 0) == NEW


# --- torn reads ---


class SlowlyReadDevice(TappedDevice):
    """Whoever reads it is held after the read, as often as there are turnstiles."""

    after_read: list[Turnstile]

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        super().pread_into(buffer, offset)
        if self.after_read and threading.current_thread() is not threading.main_thread():
            self.after_read.pop()(offset, len(buffer))


@pytest.fixture
def slow(tracked: TrackedDisk) -> Iterator[Filter]:
    SlowlyReadDevice.after_read = []
    with Filter.attach(tracked.store, NAME, open_device=SlowlyReadDevice.open, background=False) as disk:
        yield disk


def test_reader_that_is_overtaken_by_a_writer_sees_old_data(slow: Filter, folder: Path) -> None:
    snapshot, found = slow.snapshot("s", scratch(folder)), []
    before = Turnstile()
    slow.device.after_read = [before]  # type: ignore[attr-defined]
    reader = start(lambda: found.append(snapshot.pread(4 * BLOCK, 0)))
    assert before.arrived.wait(PATIENCE_SECONDS)
    slow.pwrite(NEW * 2, BLOCK)
    before.go_on.set()
    join(reader)
    assert found == [OLD * 4]


class OvertakenDevice(TappedDevice):
    """Whoever reads it is held before the read, as often as there are turnstiles."""

    overtake: list[Turnstile]

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        if self.overtake and threading.current_thread() is not threading.main_thread():
            self.overtake.pop()(offset, len(buffer))
        super().pread_into(buffer, offset)


@contextmanager
def overtaken(tracked: TrackedDisk) -> Iterator[tuple[Filter, Turnstile]]:
    OvertakenDevice.overtake = []
    with Filter.attach(tracked.store, NAME, open_device=OvertakenDevice.open, background=False) as disk:
        yield disk, Turnstile()


def test_reader_before_whom_the_writer_lands_sees_old_data(tracked: TrackedDisk, folder: Path) -> None:
    """The image changes between the reader's look at the states and its read."""
    with overtaken(tracked) as (disk, turnstile):
        snapshot, found = disk.snapshot("s", scratch(folder)), []
        disk.device.overtake = [turnstile]  # type: ignore[attr-defined]
        reader = start(lambda: found.append(snapshot.pread(BLOCK, 0)))
        assert turnstile.arrived.wait(PATIENCE_SECONDS)
        disk.pwrite(NEW, 0)
        turnstile.go_on.set()
        join(reader)
        assert found == [OLD]


def test_allocation_of_what_was_written_meanwhile_is_not_believed(
    disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image says "a hole" of a block that was data when the snapshot was made, and is discarded just now."""
    snapshot, allocation = disk.snapshot("s", scratch(folder)), disk.device.allocation

    def discard_first(offset: int, length: int) -> object:
        monkeypatch.undo()
        disk.discard(0, BLOCK)
        return allocation(offset, length)

    monkeypatch.setattr(disk.device, "allocation", discard_first)
    assert not any(part.zero for part in snapshot.allocation(0, BLOCK))


def test_image_is_asked_once_where_it_is_allocated_however_much_was_touched(
    disk: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems go through all data to say where it ends, and have writers wait meanwhile."""
    disk.discard(100 * BLOCK, 100 * BLOCK)
    snapshot, allocation = disk.snapshot("s", scratch(folder)), disk.device.allocation
    asked: list[tuple[int, int]] = []

    def note(offset: int, length: int) -> Iterator[Allocation]:
        asked.append((offset, length))
        return allocation(offset, length)

    for number in range(0, 150, 10):
        disk.pwrite(NEW, number * BLOCK)
    monkeypatch.setattr(disk.device, "allocation", note)
    assert list(snapshot.allocation(BLOCK, 399 * BLOCK)) == [
        Allocation(99 * BLOCK, hole=False, zero=False),
        Allocation(100 * BLOCK, hole=True, zero=True),
        Allocation(200 * BLOCK, hole=False, zero=False),
    ]
    assert asked == [(BLOCK, 399 * BLOCK)]


def test_release_waits_for_whoever_reads(slow: Filter, folder: Path) -> None:
    snapshot, found = slow.snapshot("s", scratch(folder)), []
    held = Turnstile()
    slow.device.after_read = [held]  # type: ignore[attr-defined]
    reader = start(lambda: found.append(snapshot.pread(BLOCK, 0)))
    assert held.arrived.wait(PATIENCE_SECONDS)
    releasing = start(snapshot.release)
    held.go_on.set()
    join(reader, releasing)
    assert found == [OLD]


def test_reader_of_what_is_not_wanted_any_more_is_refused(tracked: TrackedDisk, folder: Path) -> None:
    """It began to read when everything was wanted still."""
    with overtaken(tracked) as (disk, turnstile):
        snapshot, refusals = disk.snapshot("s", scratch(folder)), []
        disk.device.overtake = [turnstile]  # type: ignore[attr-defined]

        def read() -> None:
            try:
                snapshot.pread(BLOCK, 0)
            except InvalidArgument as refusal:
                refusals.append(refusal)

        reader = start(read)
        assert turnstile.arrived.wait(PATIENCE_SECONDS)
        snapshot.want_only([(7, 8)], Geometry(SIZE, 12))
        disk.pwrite(NEW, 0)
        turnstile.go_on.set()
        join(reader)
        assert len(refusals) == 1


def await_release(snapshot: Snapshot) -> None:
    """Return once it is being released: then who begins to read is refused."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with suppress(StorageError):
        while time.monotonic() < deadline:
            snapshot.pread(1, SIZE - 1)


def test_reader_that_is_still_there_at_the_release_sees_old_data(tracked: TrackedDisk, folder: Path) -> None:
    """The snapshot is released, and the guest writes, while somebody is about to read the image."""
    with overtaken(tracked) as (disk, turnstile):
        snapshot, found = disk.snapshot("s", scratch(folder)), []
        disk.device.overtake = [turnstile]  # type: ignore[attr-defined]
        reader = start(lambda: found.append(snapshot.pread(BLOCK, 0)))
        assert turnstile.arrived.wait(PATIENCE_SECONDS)
        releasing = start(snapshot.release)
        await_release(snapshot)
        disk.pwrite(NEW, 0)
        turnstile.go_on.set()
        join(reader, releasing)
        assert found == [OLD]


def test_threads_that_write_and_read_all_the_time_tear_nothing(disk: Filter, folder: Path) -> None:
    snapshot = disk.snapshot("s", scratch(folder))

    def write(first: int) -> None:
        lane = disk.lane()
        for block in range(first, BLOCKS, 3):
            lane.pwrite(NEW[:100], block * BLOCK + 7)
            lane.write_many([(block * BLOCK, memoryview(NEW))])

    writers = [start(partial(write, first)) for first in range(3)]
    torn, rounds = 0, 0
    while any(writer.is_alive() for writer in writers) or not rounds:
        torn += snapshot.pread(SIZE, 0) != OLD * BLOCKS
        rounds += 1
    join(*writers)
    assert (torn, rounds > 0) == (0, True)
    assert disk.pread(SIZE, 0) == NEW * BLOCKS
    assert snapshot.kept_bytes == SIZE
