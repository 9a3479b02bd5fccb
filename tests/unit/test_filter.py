"""An attached disk: points in time, sizes, marks by hand, and what is refused when."""

from __future__ import annotations

import contextlib
import errno
import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap import filter
from lmdbitmap.errors import AlreadyExists, Busy, InvalidArgument, NotFound, StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter, take_checkpoint, take_snapshot
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.image import open_image
from lmdbitmap.interfaces import ImageIdentity
from lmdbitmap.storage import owner, owner_file, schema
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import lane, points, session, tracking, vouching
from lmdbitmap.tracker.period import Period
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.snapshot import Snapshot
from lmdbitmap.work import forks
from lmdbitmap.work.chores import Chore, Chores
from tests.helpers.support import PATIENCE_SECONDS, make_raw_image
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, trust_of

BLOCK = 4096
SIZE = 200 * BLOCK - 1000
BLOCKS = 200


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[TrackedDisk]:
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked:
        yield tracked


@pytest.fixture
def disk(tracked: TrackedDisk) -> Iterator[Filter]:
    disk = tracked.attach()
    yield disk
    disk.abandon()


def dirty(disk: Filter, since: str = "start", until: str | None = None) -> set[int]:
    return blocks_of(disk.changes(since=since, until=until))


# --- marks ---


def test_whatever_changes_bytes_marks_the_blocks_it_touches(disk: Filter) -> None:
    disk.pwrite(b"x", 0)
    disk.pwrite(bytes(BLOCK + 2), 10 * BLOCK - 1)
    disk.write_zeroes(20 * BLOCK + 5, BLOCK)
    disk.discard(30 * BLOCK, BLOCK)
    disk.mark(SIZE - 1, 1)
    assert disk.lane().write_many([(40 * BLOCK, memoryview(b"a")), (42 * BLOCK, memoryview(b"b"))]) == {}
    answer = disk.changes(since="start")
    assert blocks_of(answer) == {0, 9, 10, 11, 20, 21, 30, 199, 40, 42}
    assert trust_of(answer) is Trust.EXACT


def test_reading_marks_nothing(disk: Filter) -> None:
    disk.pread(SIZE, 0)
    disk.pread_into(memoryview(bytearray(10)), 5)
    list(disk.allocation(0, SIZE))
    disk.flush()
    assert dirty(disk) == set()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZE, 1), (0, SIZE + 1), (5, -1)])
def test_mark_off_the_disk_is_refused(disk: Filter, offset: int, length: int) -> None:
    with pytest.raises(InvalidArgument):
        disk.mark(offset, length)
    assert dirty(disk) == set()


def test_second_owner_is_refused(tracked: TrackedDisk, disk: Filter) -> None:
    with pytest.raises(Busy):
        tracked.attach()
    with pytest.raises(Busy):
        session.adopt(tracked.store, NAME)
    with pytest.raises(Busy):
        session.remove(tracked.store, NAME)


# --- checkpoints ---


def test_checkpoint_begins_a_clean_period(disk: Filter) -> None:
    disk.pwrite(b"x", 0)
    disk.checkpoint("monday")
    assert dirty(disk, "monday") == set()
    disk.pwrite(b"x", BLOCK)
    disk.pwrite(b"x", 3 * BLOCK)
    assert dirty(disk, "monday") == {1, 3}
    assert dirty(disk, "start") == {0, 1, 3}
    assert dirty(disk, "start", "monday") == {0}


def test_extents_stay_armed_over_a_checkpoint_and_nothing_in_them_is_dirty(
    tracked: TrackedDisk, disk: Filter
) -> None:
    disk.pwrite(b"x", 0)
    disk.checkpoint("monday")
    assert disk.armed_count == 1
    disk.pwrite(b"x", 5 * BLOCK)
    assert 5 in tracked.stored_dirt()
    disk.background_pass()
    disk.background_pass()
    assert (disk.armed_count, tracked.stored_dirt()) == (0, {5})
    assert dirty(disk, "monday") == {5}
    assert trust_of(disk.changes(since="start", until="monday")) is Trust.EXACT


def test_period_that_ended_takes_no_memory(disk: Filter) -> None:
    """Not until somebody looks for garbage either: of a large disk it is much, and a server may never look."""
    ended = [weakref.ref(disk._tracking.period)]
    gc.disable()
    try:
        disk.pwrite(b"x", 0)
        disk.checkpoint("monday")
        ended.append(weakref.ref(disk._tracking.period))
        disk.forget("monday")
        assert [period() for period in ended] == [None, None]
    finally:
        gc.enable()


def test_what_is_frozen_is_the_period_that_is_open_then(disk: Filter) -> None:
    """And no other, which ended while we waited at the gate: else a commit could fall into the change (law 2)."""
    tracking = disk._tracking
    drained = tracking.gate.drained

    def checkpoint_first() -> AbstractContextManager[None]:
        tracking.gate.drained = drained  # type: ignore[method-assign]
        disk.checkpoint("monday")
        return drained()

    tracking.gate.drained = checkpoint_first  # type: ignore[assignment, method-assign]
    with tracking.frozen():
        assert tracking.period._commit.locked()
    assert not tracking.period._commit.locked()


def transaction_of(tracked: TrackedDisk) -> int:
    with tracked.store.read() as reader:
        return reader.transaction


def test_extents_stay_armed_where_the_newest_checkpoint_is_forgotten(
    tracked: TrackedDisk, disk: Filter
) -> None:
    """As after a backup that failed, while its guest writes on."""
    disk.pwrite(b"x", 0)
    disk.checkpoint("monday")
    disk.pwrite(b"x", 5 * BLOCK)
    disk.forget("monday")
    assert disk.armed_count == 1
    before = transaction_of(tracked)
    disk.pwrite(b"x", 7 * BLOCK)
    assert transaction_of(tracked) == before
    assert 7 in tracked.stored_dirt()
    assert dirty(disk, "start") == {0, 5, 7}
    assert trust_of(disk.changes(since="start")) is Trust.EXACT


def test_extents_stay_armed_for_ten_passes_of_the_thread_that_makes_them(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, all_quiet = [], threading.Event()
    disarm_quiet = Period.disarm_quiet

    def note(period: Period, limit: int, *, passes: int) -> int:
        disarmed = disarm_quiet(period, limit, passes=passes)
        left.append(period.armed_count)
        if disarmed:
            all_quiet.set()
        return disarmed

    monkeypatch.setattr(Period, "disarm_quiet", note)
    monkeypatch.setattr(filter.chores, "interval_s", 0.01)
    with Filter.attach(tracked.store, NAME) as disk:
        disk.pwrite(b"x", 0)
        assert all_quiet.wait(PATIENCE_SECONDS)
    assert sum(left) in (10, 11)  # the write may come between a pass and its note


class Hanging(FileDevice):
    """Whose identity, which each beat looks at, is not told while `hangs` is set; `asked` tells that it was asked."""

    def __init__(self, device: FileDevice) -> None:
        self.__dict__.update(vars(device))
        self.asked, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()

    def identity(self) -> ImageIdentity:
        if not self.goes_on.is_set():
            self.asked.set()
            self.goes_on.wait()
        return super().identity()


def test_a_disk_whose_beat_hangs_keeps_no_other_from_its_own(
    tracked: TrackedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filter, "INTERVAL_S", 0.01)
    session.add(tracked.store, "sdb", str(make_raw_image(tmp_path / "other.raw", SIZE)), granularity_bits=16)
    opened: list[Hanging] = []

    def open_hanging(image: str) -> Hanging:
        device = open_image(image)
        assert isinstance(device, FileDevice)
        opened.append(Hanging(device))
        return opened[0]

    hanging = Filter.attach(tracked.store, NAME, open_device=open_hanging)
    with Filter.attach(tracked.store, "sdb") as other:
        opened[0].goes_on.clear()
        assert opened[0].asked.wait(PATIENCE_SECONDS)
        silent = owner_file.last_beat(tracked.store.owner_path(hanging.disk.uuid))
        await_beats(tracked.store.owner_path(other.disk.uuid), 5)
        assert owner_file.last_beat(tracked.store.owner_path(hanging.disk.uuid)) == silent
    opened[0].goes_on.set()
    await_beats(tracked.store.owner_path(hanging.disk.uuid), 2)
    hanging.detach()


class Starved(FileDevice):
    """For whose identity there is once no memory, once `starves` is set."""

    starves = threading.Event()

    def identity(self) -> ImageIdentity:
        if self.starves.is_set():
            self.starves.clear()
            raise MemoryError
        return super().identity()


def test_a_beat_for_which_there_was_no_memory_is_followed_by_others(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(filter, "INTERVAL_S", 0.01)
    with Filter.attach(tracked.store, NAME, open_device=Starved.open) as disk:
        Starved.starves.set()
        await_beats(tracked.store.owner_path(disk.disk.uuid), 5)
        assert not Starved.starves.is_set()
    assert "a sign of life failed, and will be tried again" in caplog.text


def await_beats(path: str, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    seen = {owner_file.last_beat(path)}
    while len(seen) <= count:
        assert time.monotonic() < deadline
        seen.add(owner_file.last_beat(path))


def test_a_pass_that_hangs_keeps_no_disk_from_its_beats(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filter.chores, "interval_s", 0.01)
    monkeypatch.setattr(filter, "INTERVAL_S", 0.01)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(period: Period, limit: int, *, passes: int) -> int:
        hangs.set()
        goes_on.wait()
        return 0

    monkeypatch.setattr(Period, "disarm_quiet", hang)
    with Filter.attach(tracked.store, NAME) as disk:
        assert hangs.wait(PATIENCE_SECONDS)
        await_beats(tracked.store.owner_path(disk.disk.uuid), 5)
        goes_on.set()


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 2000, "start", "epoch-1", None, b"monday", 5])
def test_impossible_checkpoint_changes_nothing(disk: Filter, name: Any) -> None:
    disk.pwrite(b"x", 0)
    with pytest.raises((InvalidArgument, AlreadyExists)):
        disk.checkpoint(name)
    disk.pwrite(b"x", BLOCK)
    assert dirty(disk) == {0, 1}


@pytest.fixture
def pair(tmp_path: Path, tracked: TrackedDisk, disk: Filter) -> Iterator[tuple[Filter, Filter]]:
    image = make_raw_image(tmp_path / "other.raw", SIZE)
    session.add(tracked.store, "sdb", str(image), granularity_bits=16)
    other = Filter.attach(tracked.store, "sdb", background=False)
    yield disk, other
    other.abandon()


def test_checkpoint_of_two_disks_is_on_both(pair: tuple[Filter, Filter]) -> None:
    one, two = pair
    taken = take_checkpoint([two, one], "both")
    assert [point.disk for point in taken] == [two.disk.uuid, one.disk.uuid]
    assert len({point.time_ns for point in taken}) == 1
    for disk in pair:
        disk.pwrite(b"x", 0)
        assert dirty(disk, "both") == {0}


def test_checkpoint_that_one_of_two_disks_has_already_is_on_neither(pair: tuple[Filter, Filter]) -> None:
    one, two = pair
    two.checkpoint("taken")
    for disk in pair:
        disk.pwrite(b"x", 0)
    for order in ([one, two], [two, one]):
        with pytest.raises(AlreadyExists):
            take_checkpoint(order, "taken")
    for disk in pair:
        disk.pwrite(b"x", 70000)
    with pytest.raises(NotFound):
        one.changes(since="taken")
    assert dirty(one) == {0, 70000 // BLOCK}
    assert dirty(two, "taken") == {0, 1}


@pytest.mark.parametrize("end", ["detached", "dead"])
def test_a_store_that_is_closed_first_goes_on_until_the_disk_is_let_go(
    tracked: TrackedDisk, end: str
) -> None:
    disk = tracked.attach()
    tracked.store.close()
    disk.pwrite(b"x", 7 * BLOCK)
    disk.checkpoint("late")
    disk.pwrite(b"y", 9 * BLOCK)
    tracked.store.close()
    disk.detach() if end == "detached" else disk.abandon()
    with pytest.raises(StorageError, match="it is closed"), tracked.store.read():
        pass
    tracked.store = Store.open(tracked.store.path)
    answer = tracked.changes("start")
    assert trust_of(answer) is (Trust.EXACT if end == "detached" else Trust.SUPERSET)
    assert blocks_of(answer) >= {7, 9}


def test_disk_named_twice_is_refused(pair: tuple[Filter, Filter]) -> None:
    with pytest.raises(InvalidArgument):
        take_checkpoint([pair[0], pair[1], pair[0]], "twice")
    with pytest.raises(InvalidArgument):
        take_checkpoint([], "none")
    take_checkpoint(pair, "once")


def test_disks_of_two_stores_have_no_checkpoint_in_common(tmp_path: Path, disk: Filter) -> None:
    with Store.create(tmp_path / "second") as store:
        session.add(store, "sdb", make_raw_image(tmp_path / "other.raw", SIZE), granularity_bits=16)
        with Filter.attach(store, "sdb", background=False) as other:
            with pytest.raises(
                InvalidArgument, match=r"the disks are of several stores, .*store and .*second;"
            ):
                take_checkpoint([disk, other], "both")
            with pytest.raises(InvalidArgument, match="several stores"):
                take_snapshot([disk, other], "both", Scratch(str(tmp_path)))
            assert not disk.snapshots
            disk.checkpoint("both")


def test_disks_of_a_store_and_of_a_copy_of_it_have_no_checkpoint_in_common(
    tracked: TrackedDisk, tmp_path: Path
) -> None:
    """A copy has the same uuid, and the same disks: its checkpoint would look as if it were of both."""
    session.add(tracked.store, "sdb", make_raw_image(tmp_path / "other.raw", SIZE), granularity_bits=16)
    tracked.store.close()
    shutil.copytree(tracked.store.path, tmp_path / "copy")
    with (
        Store.open(tracked.store.path) as store,
        Store.open(tracked.store.path) as same,
        Store.open(tmp_path / "copy") as copy,
        Filter.attach(store, NAME, background=False) as disk,
    ):
        with (
            Filter.attach(copy, "sdb", background=False) as other,
            pytest.raises(InvalidArgument, match="several stores"),
        ):
            take_checkpoint([disk, other], "both")
        with Filter.attach(same, "sdb", background=False) as other:
            take_checkpoint([disk, other], "both")


@pytest.mark.parametrize("durability", schema.DURABILITIES)
def test_forgotten_checkpoint_leaves_its_dirt_to_the_one_before(tmp_path: Path, durability: str) -> None:
    with closing(TrackedDisk(tmp_path, SIZE, durability=durability).clean()) as tracked:
        disk = tracked.attach()
        for number, name in enumerate(("monday", "tuesday")):
            disk.pwrite(b"x", number * BLOCK)
            disk.checkpoint(name)
        disk.pwrite(b"x", 5 * BLOCK)
        disk.forget("tuesday")  # the newest: its bitmap was recording
        assert dirty(disk, "monday") == {1, 5}
        disk.pwrite(b"x", 6 * BLOCK)
        disk.pwrite(b"x", 5 * BLOCK)
        disk.forget("start")
        disk.forget("epoch-1")
        assert dirty(disk, "monday") == {1, 5, 6}
        with pytest.raises(InvalidArgument):
            disk.forget("monday")
        with pytest.raises(NotFound):
            disk.forget("tuesday")
        disk.detach()
        assert tracked.checkpoints() == ["monday"]
        assert blocks_of(tracked.changes("monday")) == {1, 5, 6}


def test_period_that_cannot_be_opened_makes_no_checkpoint(
    tracked: TrackedDisk, disk: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no memory for another bitmap: the old period goes on, in the store as in memory."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise StorageError("memory", OSError(errno.ENOMEM, "none"), next_step="free some")

    with monkeypatch.context() as patched:
        patched.setattr(tracking, "Period", refuse)
        for change in (
            lambda: disk.checkpoint("monday"),
            lambda: disk.resize(10),
            lambda: disk.forget("start"),
        ):
            with pytest.raises(StorageError):
                change()
    assert tracked.checkpoints() == ["epoch-1", "start"]
    disk.pwrite(b"x", 3 * BLOCK)
    assert 3 in tracked.stored_dirt()
    assert dirty(disk) == {3}


def test_what_is_quiet_is_not_written_while_writers_wait(
    disk: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_exact, armed = Period.put_exact, []

    def noted(period: Period, *how: Any) -> None:
        armed.append(period.armed_count)
        put_exact(period, *how)

    monkeypatch.setattr(Period, "put_exact", noted)
    disk.pwrite(b"x", 0)
    disk.background_pass()
    disk.pwrite(b"x", 100 * BLOCK)
    disk.checkpoint("monday")
    assert (armed, disk.armed_count) == ([1], 2)
    assert dirty(disk, "start") == {0, 100}
    assert dirty(disk, "monday") == set()


def test_nothing_is_armed_behind_the_end_of_a_disk_that_shrinks_in_the_last_moment(
    disk: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_beforehand = points._write_beforehand

    def and_shrink(tracking: Any) -> object:
        likely = write_beforehand(tracking)
        disk.resize(10 * BLOCK)
        return likely

    monkeypatch.setattr(points, "_write_beforehand", and_shrink)
    disk.pwrite(b"x", 150 * BLOCK)
    disk.checkpoint("monday")
    assert disk.armed_count == 0
    assert dirty(disk, "monday") == set()


def test_interrupted_checkpoint_is_not_believed(tracked: TrackedDisk, disk: Filter) -> None:
    """Ctrl-C after the commit, before memory followed: the next write would go to the wrong bitmap."""
    update = tracked.store.update

    def commit_and_interrupt(change: Callable[..., Any]) -> None:
        update(change)
        raise KeyboardInterrupt

    disk.pwrite(b"x", 0)
    tracked.store.update = commit_and_interrupt  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        disk.checkpoint("monday")
    tracked.store.update = update  # type: ignore[method-assign]
    disk.pwrite(b"x", 7 * BLOCK)
    assert trust_of(disk.changes(since="monday")) is Trust.UNTRUSTED
    assert trust_of(tracked.changes("monday")) is Trust.UNTRUSTED
    disk.background_pass()
    with pytest.raises(Untrusted):
        disk.changes(since="monday")
    assert dirty(disk, "epoch-2") == set(range(BLOCKS))


def interrupted_checkpoint(store: Store, name: str, *disks: Filter) -> None:
    """Take a checkpoint; Ctrl-C comes after its commit. Raises what comes of that."""
    update = store.update

    def commit_and_interrupt(change: Callable[..., Any]) -> None:
        store.update = update  # type: ignore[method-assign]
        update(change)
        raise KeyboardInterrupt

    store.update = commit_and_interrupt  # type: ignore[method-assign, assignment]
    take_checkpoint(disks, name)


def refuse_distrust(patched: pytest.MonkeyPatch, refusal: BaseException) -> None:
    def refuse(*arguments: Any) -> None:
        raise refusal

    patched.setattr(owner.Owner, "declare_distrust", refuse)


EIO = StorageError("owner's file", OSError(errno.EIO, "refused"), next_step="mend it")


def test_checkpoint_that_is_interrupted_again_is_not_believed_by_the_next_write(
    tracked: TrackedDisk, disk: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that is to a block that was dirty before, and would take the fast path."""
    disk.pwrite(b"x", 0)
    with monkeypatch.context() as patched:
        refuse_distrust(patched, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            interrupted_checkpoint(tracked.store, "monday", disk)
    disk.pwrite(b"y", 0)
    assert trust_of(disk.changes(since="monday")) is Trust.UNTRUSTED
    assert trust_of(tracked.changes("monday")) is Trust.UNTRUSTED


def test_checkpoint_that_is_interrupted_again_stays_in_the_chain_after_a_detach(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracked.attach() as disk, monkeypatch.context() as patched:
        refuse_distrust(patched, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            interrupted_checkpoint(tracked.store, "monday", disk)
    with tracked.attach() as disk:
        disk.pwrite(b"x", 9 * BLOCK)
        disk.checkpoint("tuesday")
        assert tracked.checkpoints() == ["epoch-1", "start", "monday", "tuesday"]
        assert dirty(disk) == dirty(disk, "monday", "tuesday") == {9}


def test_no_write_passes_while_it_cannot_be_said_that_a_checkpoint_was_interrupted(
    tracked: TrackedDisk, disk: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image without an mtime, on which silence says nothing. A store that refuses changes nothing about that."""
    disk.pwrite(b"x", 0)
    monkeypatch.setattr(disk.device, "identity", lambda: ImageIdentity(1, 2, SIZE, 0))
    with monkeypatch.context() as patched:
        refuse_distrust(patched, EIO)
        with pytest.raises(StorageError, match="cannot record a write"):
            interrupted_checkpoint(tracked.store, "monday", disk)
        with pytest.raises(AlreadyExists):
            disk.checkpoint("monday")
        with pytest.raises(StorageError, match="cannot record a write"):
            disk.pwrite(b"y", 0)
        with pytest.raises(StorageError, match="cannot record a write"):
            disk.mark_regions([(0, b"\1".ljust(512, b"\0"))], disk.disk.geometry)
    assert disk.pread(1, 0) == b"x"
    disk.checkpoint("tuesday")
    disk.pwrite(b"y", 0)
    assert tracked.checkpoints() == ["epoch-1", "start", "monday", "tuesday"]
    assert dirty(disk, "tuesday") == {0}
    assert 0 in dirty(disk, "monday")


def test_an_interrupted_checkpoint_of_two_disks_is_not_believed_of_the_one_that_can_say_so(
    tracked: TrackedDisk, pair: tuple[Filter, Filter], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    for order in ((one, two), (two, one)):
        with monkeypatch.context() as patched:
            patched.setattr(one._voucher, "lose_track", interrupted)
            with pytest.raises(KeyboardInterrupt):
                interrupted_checkpoint(tracked.store, f"first is {order[0].disk.name}", *order)
        assert trust_of(two.changes()) is Trust.UNTRUSTED
        two.regain_trust()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


# --- sizes ---


def test_grown_area_is_dirty(disk: Filter) -> None:
    disk.resize(300 * BLOCK)
    assert disk.size == disk.device.size == 300 * BLOCK
    assert dirty(disk) == set(range(199, 300))
    disk.pwrite(b"x", 299 * BLOCK)


def test_bits_past_the_end_are_gone_for_good(disk: Filter) -> None:
    disk.pwrite(b"x", 150 * BLOCK)
    disk.checkpoint("monday")
    disk.pwrite(b"x", 160 * BLOCK)
    disk.pwrite(b"x", 5 * BLOCK)
    disk.resize(100 * BLOCK + 1)
    assert dirty(disk) == {
        5,
        100,
    }  # the block that the end cuts might have been half zeroed, had the power failed
    disk.checkpoint("tuesday")
    disk.resize(BLOCKS * BLOCK)
    assert dirty(disk, "start", "tuesday") == {5, *range(100, BLOCKS)}  # new, and so dirty in every period
    assert dirty(disk, "tuesday") == set(range(100, BLOCKS))
    with pytest.raises(InvalidArgument):
        disk.pwrite(b"x", BLOCKS * BLOCK)


def test_resize_to_nothing_and_back(disk: Filter) -> None:
    disk.pwrite(b"x", 0)
    disk.resize(0)
    assert (disk.size, dirty(disk)) == (0, set())
    disk.pwrite(b"", 0)
    disk.resize(BLOCK)
    assert dirty(disk) == {0}


@pytest.mark.parametrize("size", [-1, 1 << 63, 1 << 70, 1e6, "1M", None])
def test_impossible_size_changes_nothing(disk: Filter, size: Any) -> None:
    disk.pwrite(b"x", 0)
    with pytest.raises(InvalidArgument):
        disk.resize(size)
    assert (disk.size, disk.device.size, dirty(disk)) == (SIZE, SIZE, {0})


class FixedDevice(FileDevice):
    """An image that cannot be resized, as a block device is."""

    def resize(self, size: int) -> None:
        raise OSError(errno.EPERM, "fixed")


@pytest.mark.parametrize("size", [5 * BLOCK, 500 * BLOCK])
def test_refused_resize_leaves_every_bit_where_it_was(tracked: TrackedDisk, size: int) -> None:
    disk = Filter.attach(tracked.store, NAME, open_device=FixedDevice.open, background=False)
    disk.pwrite(b"x", 150 * BLOCK)
    disk.checkpoint("monday")
    disk.pwrite(b"x", 2 * BLOCK)
    with pytest.raises(StorageError, match="fixed"):
        disk.resize(size)
    assert disk.size == SIZE
    assert dirty(disk, "start", "monday") == {150}
    assert {2, 150} <= dirty(disk)
    disk.pwrite(b"x", 199 * BLOCK)
    assert 199 in dirty(disk)
    disk.detach()
    assert tracked.disk().resizing_from is None


@pytest.mark.parametrize("change", ["resize", "forget", "checkpoint", "detach"])
def test_chain_does_not_change_while_bits_are_being_written(tmp_path: Path, change: str) -> None:
    """In deferred mode the records on their way lack what was written since: they must not land last."""
    with closing(TrackedDisk(tmp_path, SIZE, durability=schema.DEFERRED).clean()) as tracked:
        disk = tracked.attach()
        disk.checkpoint("monday")
        disk.pwrite(b"x", BLOCK)
        update, overtaken = tracked.store.update, threading.Event()
        changes: dict[str, Callable[[], object]] = {
            "resize": lambda: disk.resize(150 * BLOCK),
            "forget": lambda: disk.forget("monday"),
            "checkpoint": lambda: disk.checkpoint("tuesday"),
            "detach": disk.detach,
        }

        def write_and_change() -> None:
            disk.pwrite(b"x", 2 * BLOCK)
            changes[change]()
            overtaken.set()

        other = threading.Thread(target=write_and_change)

        def let_another_try(of_persist: Callable[[Writer], Any]) -> Any:
            tracked.store.update = update  # type: ignore[method-assign]
            other.start()
            overtaken.wait(0.2)
            return update(of_persist)

        tracked.store.update = let_another_try  # type: ignore[method-assign, assignment]
        disk.persist()
        other.join(PATIENCE_SECONDS)
        disk.detach()
        assert blocks_of(tracked.changes("start")) == {1, 2}


@pytest.mark.parametrize("change", ["resize", "forget", "checkpoint"])
def test_pass_that_comes_too_late_writes_over_nothing(
    tracked: TrackedDisk, disk: Filter, change: str
) -> None:
    """It looked up the period, and then the chain changed: the period after may record into the same bitmap."""
    disk.checkpoint("monday")
    disk.pwrite(b"x", 0)
    late = disk._tracking.period
    changes: dict[str, Callable[[], object]] = {
        "resize": lambda: disk.resize(150 * BLOCK),
        "forget": lambda: disk.forget("monday"),
        "checkpoint": lambda: disk.checkpoint("tuesday"),
    }
    changes[change]()
    disk.pwrite(b"x", 9 * BLOCK)
    for _ in range(2):
        late.disarm_quiet(100)
    late.persist()
    assert 9 in tracked.stored_dirt()
    assert dirty(disk) == {0, 9}


# --- the end ---


def test_detached_disk_refuses_everything_and_writes_nothing(tracked: TrackedDisk) -> None:
    """The next owner's records are not ours to write over."""
    late = tracked.attach()
    late.pwrite(b"x", 0)
    lane = late.lane()
    late.detach()
    with tracked.attach() as disk:
        disk.pwrite(b"x", BLOCK)
        before = tracked.disk()
        calls: list[Callable[[], object]] = [
            lambda: late.pwrite(b"x", 0),
            lambda: lane.pwrite(b"x", 0),
            late.lane().flush,
            lambda: late.write_zeroes(0, 1),
            lambda: late.mark(0, 1),
            lambda: late.checkpoint("late"),
            lambda: late.forget("start"),
            lambda: late.forget("epoch-1"),
            lambda: late.resize(BLOCK),
            lambda: late.start_epoch("late"),
            late.persist,
            late.changes,
            lambda: late.changes(persist=False),
        ]
        for call in calls:
            with pytest.raises(StorageError, match="it is detached; attach it again"):
                call()
        with pytest.raises(OSError):
            late.beat()
        late.background_pass()
        late.detach()
        late.abandon()
        assert tracked.disk() == before
        assert dirty(disk) == {0, 1}


def test_acts_at_detach_are_done_when_it_is_clean(tracked: TrackedDisk) -> None:
    done: list[set[int]] = []
    disk = tracked.attach()
    disk.pwrite(b"x", 0)
    disk.at_detach(lambda: done.append(blocks_of(tracked.changes("start"))))
    disk.detach()
    assert done == [{0}]
    disk = tracked.attach()
    disk.at_detach(lambda: done.append(set()))
    disk.abandon()
    assert done == [{0}]


def test_whoever_detaches_second_waits_for_the_end(tracked: TrackedDisk) -> None:
    disk = tracked.attach()
    under_way, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def linger() -> None:
        under_way.set()
        assert go_on.wait(PATIENCE_SECONDS)
        disk.detach()  # from within, as a signal handler might
        ended.set()

    disk.at_detach(linger)
    seen: list[bool] = []
    first = threading.Thread(target=disk.detach)
    second = threading.Thread(target=lambda: seen.append((disk.detach(), ended.is_set())[1]))  # type: ignore[func-returns-value]
    first.start()
    assert under_way.wait(PATIENCE_SECONDS)
    second.start()
    second.join(0.05)
    assert seen == []
    go_on.set()
    for thread in (first, second):
        thread.join(PATIENCE_SECONDS)
    assert seen == [True]


def test_an_interrupted_detach_is_done_all_the_same(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a sign of life is waited for: the disk must not stay ours for as long as this process lives."""

    end = filter.chores.end

    def end_and_interrupt(chore: Chore) -> None:
        end(chore)
        raise KeyboardInterrupt

    disk = Filter.attach(tracked.store, NAME)
    disk.pwrite(b"x", 0)
    with monkeypatch.context() as patched:
        patched.setattr(filter.chores, "end", end_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            disk.detach()
    assert disk._passes not in filter.chores._chores
    assert not disk._beats.is_alive()
    with tracked.attach() as again:
        assert dirty(again) == {0}


def test_a_detach_that_is_interrupted_while_writes_are_in_flight_can_be_done_once_more(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not close the image under them; and as long as it is attached somebody vouches for it."""

    def interrupted(lanes: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(filter, "INTERVAL_S", 0.01)
    disk = Filter.attach(tracked.store, NAME)
    with monkeypatch.context() as patched:
        patched.setattr(lane, "_await_idle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.detach()
    disk.pwrite(b"x", 7 * BLOCK)
    await_beats(tracked.store.owner_path(disk.disk.uuid), 2)
    assert disk._passes in filter.chores._chores
    disk.detach()
    assert not disk._beats.is_alive()
    with tracked.attach() as again:
        assert dirty(again) == {7}


def test_a_detach_that_is_interrupted_before_its_first_step_can_be_done_once_more(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Filter.attach(tracked.store, NAME)
    beats = disk._beats
    with monkeypatch.context() as patched:
        patched.setattr(contextlib.ExitStack, "callback", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.detach()
    disk.pwrite(b"x", 7 * BLOCK)
    assert disk._beats is beats
    assert beats.is_alive()
    disk.detach()
    assert not beats.is_alive()
    with tracked.attach() as again:
        assert dirty(again) == {7}


@pytest.mark.parametrize(
    ("kind", "step"), [(Filter, "_end_beats"), (FileDevice, "close"), (vouching.Voucher, "close")]
)
def test_a_detach_that_is_interrupted_in_a_step_ends_what_that_was_to_end(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch, kind: type, step: str
) -> None:
    disk = Filter.attach(tracked.store, NAME)
    disk.pwrite(b"x", 7 * BLOCK)
    take_step, interruptions = getattr(kind, step), [KeyboardInterrupt()]

    def interrupt_first(ended: object) -> None:
        if interruptions:
            raise interruptions.pop()
        take_step(ended)

    with monkeypatch.context() as patched:
        patched.setattr(kind, step, interrupt_first)
        with pytest.raises(KeyboardInterrupt):
            disk.detach()
    assert not disk._beats.is_alive()
    assert disk._passes not in filter.chores._chores
    with tracked.attach() as again:
        assert dirty(again) == {7}


def test_a_detach_whose_beats_are_being_ended_waits_for_no_lock_that_an_interruption_kept(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the `set` of an event does, whose condition is left by a function in Python."""
    disk = Filter.attach(tracked.store, NAME)
    leave, interruptions = threading.Condition.__exit__, list[BaseException]()

    def interrupt_first(condition: threading.Condition, *how: Any) -> None:
        if interruptions and threading.current_thread() is ending:
            raise interruptions.pop()
        leave(condition, *how)

    def detach() -> None:
        interruptions.append(KeyboardInterrupt())
        with contextlib.suppress(KeyboardInterrupt):
            disk.detach()

    ending = threading.Thread(target=detach, daemon=True)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Condition, "__exit__", interrupt_first)
        ending.start()
        ending.join(PATIENCE_SECONDS)
    assert not ending.is_alive()
    tracked.attach().abandon()


def test_a_disk_is_let_go_though_a_snapshot_of_it_cannot_be_waited_for(
    tracked: TrackedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(snapshot: Snapshot) -> None:
        raise KeyboardInterrupt

    disk = tracked.attach()
    disk.snapshot("held", Scratch(str(tmp_path)))
    with monkeypatch.context() as patched:
        patched.setattr(Snapshot, "release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.detach()
    with tracked.attach() as again:
        assert dirty(again) == set()


def test_a_disk_with_fewer_than_no_armed_extents_is_not_attached(tracked: TrackedDisk) -> None:
    with pytest.raises(InvalidArgument):
        tracked.attach(max_armed=-1)
    with closing(tracked.attach(max_armed=0)) as disk:
        disk.pwrite(b"guest", 0)
        disk.pwrite(b"guest", SIZE // 2)
        assert len(dirty(disk)) == 2


def test_a_checkpoint_that_is_refused_leaves_the_words_of_a_shared_refusal(
    disk: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All who use a disk that is detached get the same one."""
    refusal = StorageError("disk", OSError(errno.EBADF, "detached"), next_step="attach it again")

    def refuse(of: tracking.Tracking) -> None:
        raise refusal

    monkeypatch.setattr(tracking.Tracking, "mark_doubts", refuse)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"disk: detached; no checkpoint was made; attach it again$"):
            disk.checkpoint("monday")
    assert refusal.next_step == "attach it again"


@pytest.mark.parametrize("name", ["lmdbitmap beat", "lmdbitmap clock"])
def test_a_disk_that_gets_no_thread_is_not_attached(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(filter, "chores", Chores(0.5))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_others)
        with pytest.raises(StorageError, match="cannot be attached"):
            Filter.attach(tracked.store, NAME)
    with Filter.attach(tracked.store, NAME) as disk:
        assert disk._beats.is_alive()


@pytest.mark.parametrize("name", ["lmdbitmap beat", "lmdbitmap clock"])
def test_an_attach_that_is_interrupted_when_its_threads_begin_leaves_nothing_attached(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start = threading.Thread.start

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == name:
            raise KeyboardInterrupt

    monkeypatch.setattr(filter, "chores", Chores(0.5))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            Filter.attach(tracked.store, NAME)
    with Filter.attach(tracked.store, NAME) as disk:
        assert disk._beats.is_alive()


def test_an_attach_that_is_interrupted_before_its_threads_begin_leaves_nothing_attached(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(inherited: object) -> None:
        if isinstance(inherited, Filter):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(forks, "is_not_for_children", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Filter.attach(tracked.store, NAME)
    with tracked.attach() as disk:
        disk.pwrite(b"x", 0)


# --- adopt ---


def test_adopted_image_keeps_its_checkpoints(tracked: TrackedDisk) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x", 0)
    tracked.write_behind_our_back(b"\0", 9 * BLOCK)
    assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED
    session.adopt(tracked.store, NAME)
    assert blocks_of(tracked.changes("start")) == {0}
    with tracked.attach() as disk:
        assert dirty(disk) == {0}


@pytest.mark.parametrize(
    ("size", "gone", "new"), [(5 * BLOCK, {150}, set()), (210 * BLOCK, set(), set(range(199, 210)))]
)
def test_adopted_size_is_a_resize(tracked: TrackedDisk, size: int, gone: set[int], new: set[int]) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x", 0)
        disk.pwrite(b"x", 150 * BLOCK)
    with tracked.image.open("r+b") as image:
        image.truncate(size)
    assert session.adopt(tracked.store, NAME).size == size
    assert blocks_of(tracked.changes("start")) == {0, 150} - gone | new


def test_lost_bits_cannot_be_adopted(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, SIZE, durability=schema.DEFERRED).clean()) as tracked:
        tracked.attach().abandon()
        with pytest.raises(Untrusted):
            session.adopt(tracked.store, NAME)
