"""Snapshots of a disk that is served: asked for from outside, read over NBD, released by whoever comes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.access import operations, owners
from lmdbitmap.access.direct import DirectDevice
from lmdbitmap.access.served_snapshots import (
    open_served_snapshot,
    release_served_snapshot,
    take_served_snapshot,
)
from lmdbitmap.backups.backup import backup
from lmdbitmap.errors import AlreadyExists, Busy, InvalidArgument, LmdbitmapError, NotFound, StorageError
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.control_client import reach
from lmdbitmap.tracker.snapshot import Snapshot
from tests.helpers.serving import Serving, serving
from tests.helpers.support import PATIENCE_SECONDS
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

BLOCK = 4096


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def tracked(folder: Path) -> TrackedDisk:
    return TrackedDisk(folder, 100 * BLOCK).clean()


@pytest.fixture
def serves(tracked: TrackedDisk, folder: Path) -> Iterator[Serving]:
    with serving(tracked, folder, listening=folder / "s") as serves:
        yield serves


def test_what_is_held_is_read_as_it_was_and_released(serves: Serving) -> None:
    disk, store = serves.disk, serves.disk.store
    disk.pwrite(b"old", 0)
    [held] = take_served_snapshot(store, [NAME], "monday")
    [snapshot] = disk.snapshots
    assert (held.disk, held.checkpoint, held.export) == (NAME, "monday", "sda@monday")
    assert (held.uuid, held.time_ns) == (snapshot.checkpoint.uuid, snapshot.checkpoint.time_ns)
    disk.pwrite(b"new", 0)
    [uri] = serves.server.uris_of(held.export)
    with closing(NbdDevice.open(uri, read_only=True)) as device:
        assert device.pread(3, 0) == b"old"
    assert release_served_snapshot(store, NAME, "monday") >= 3
    assert disk.snapshots == ()
    with pytest.raises(NotFound, match="holds no snapshot of checkpoint 'monday'"):
        release_served_snapshot(store, NAME, "monday")


@pytest.mark.parametrize("direct", [True, False, None])
def test_a_program_reads_it_past_the_server_or_through_it(serves: Serving, direct: bool | None) -> None:
    disk, store = serves.disk, serves.disk.store
    disk.pwrite(b"old", BLOCK)
    [held] = take_served_snapshot(store, [NAME], "monday")
    assert held.direct
    disk.pwrite(b"new", BLOCK)
    with open_served_snapshot(store, held._replace(direct=direct)) as device:
        assert isinstance(device, DirectDevice) == bool(direct)
        assert (device.size, device.pread(3, BLOCK)) == (100 * BLOCK, b"old")
        disk.pwrite(b"newer", 7 * BLOCK)
        assert device.pread(5, 7 * BLOCK) == bytes(5)
    assert release_served_snapshot(store, NAME, "monday", uuid=held.uuid) >= 3


def test_another_snapshot_of_that_name_is_not_taken_for_it(serves: Serving) -> None:
    disk, store = serves.disk, serves.disk.store
    [first] = take_served_snapshot(store, [NAME], "monday")
    release_served_snapshot(store, NAME, "monday")
    disk.forget("monday")
    [second] = take_served_snapshot(store, [NAME], "monday")
    with pytest.raises(NotFound, match="made anew"), open_served_snapshot(store, first):
        pass
    with pytest.raises(NotFound, match="holds no snapshot of checkpoint 'monday'"):
        release_served_snapshot(store, NAME, "monday", uuid=first.uuid)
    assert release_served_snapshot(store, NAME, "monday", uuid=second.uuid) == 0


def test_one_that_broke_is_unusable_also_for_a_program_that_read_it(serves: Serving) -> None:
    disk, store = serves.disk, serves.disk.store
    [held] = take_served_snapshot(store, [NAME], "monday")
    [snapshot] = disk.snapshots
    with open_served_snapshot(store, held) as device:
        device.pread(3, 0)
        snapshot._break("the room is full")
        with pytest.raises(OSError):
            device.pread(3, 0)
    with pytest.raises(StorageError, match="the room is full"):
        release_served_snapshot(store, NAME, "monday", uuid=held.uuid)


def test_it_is_held_for_nobody_in_particular(serves: Serving) -> None:
    """Who asked has hung up long ago."""
    take_served_snapshot(serves.disk.store, [NAME], "monday")
    take_served_snapshot(serves.disk.store, [NAME], "tuesday", since="monday")
    assert [snapshot.checkpoint.name for snapshot in serves.disk.snapshots] == ["monday", "tuesday"]
    with pytest.raises(AlreadyExists, match="has a checkpoint 'monday' already"):
        take_served_snapshot(serves.disk.store, [NAME], "monday")


@pytest.mark.parametrize("since", ["sunday", "tuesday"])
def test_nothing_is_made_where_nobody_knows_what_to_count_from(serves: Serving, since: str) -> None:
    """Nor is the checkpoint that is asked for one to count from."""
    store = serves.disk.store
    with pytest.raises(NotFound, match=f"has no checkpoint '{since}'"):
        take_served_snapshot(store, [NAME], "tuesday", since=since)
    with store.read() as reader:
        assert "tuesday" not in [made.name for made in reader.checkpoints(serves.disk.disk.uuid)]
    assert serves.disk.snapshots == ()
    take_served_snapshot(store, [NAME], "tuesday")


def test_of_one_that_broke_nobody_believes_what_was_read(serves: Serving) -> None:
    take_served_snapshot(serves.disk.store, [NAME], "monday")
    serves.disk.snapshots[0]._break("the room is full")
    with pytest.raises(StorageError, match="the room is full"):
        release_served_snapshot(serves.disk.store, NAME, "monday")
    assert serves.disk.snapshots == ()


def test_an_owner_that_takes_too_long_is_given_up(serves: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    was_given_up = threading.Event()
    take = HeldSnapshots.take

    def late(held: HeldSnapshots, *what: Any, **how: Any) -> list[Snapshot]:
        assert was_given_up.wait(PATIENCE_SECONDS)
        return take(held, *what, **how)

    monkeypatch.setattr(HeldSnapshots, "take", late)
    with pytest.raises(Busy, match=r"did not answer within 0\.05 s"):
        take_served_snapshot(serves.disk.store, [NAME], "monday", freeze_limit_s=0.05)
    callers = [thread for thread in threading.enumerate() if thread.name == "lmdbitmap caller"]
    was_given_up.set()
    for caller in callers:
        caller.join(PATIENCE_SECONDS)
    assert "monday" in names_of(serves), "it was made all the same"
    assert serves.disk.snapshots == (), "of which nobody heard"
    assert list(serves.server._places.disks(private=True)) == [NAME]


def test_one_that_is_made_while_the_guest_of_who_gave_it_up_is_thawed_is_released(
    serves: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thaw takes a moment. The answer that comes meanwhile is read by nobody."""
    thaws = threading.Event()
    take = HeldSnapshots.take
    monkeypatch.setattr(HeldSnapshots, "take", lambda *what, **how: thaws.wait(20) and take(*what, **how))

    @contextmanager
    def frozen() -> Iterator[None]:
        try:
            yield
        finally:
            callers = [thread for thread in threading.enumerate() if thread.name == "lmdbitmap caller"]
            thaws.set()
            for caller in callers:
                caller.join(0.5)

    with pytest.raises(Busy, match="did not answer within"):
        take_served_snapshot(serves.disk.store, [NAME], "monday", quiesced=frozen, freeze_limit_s=0.05)
    assert "monday" in names_of(serves), "it was made all the same"
    assert serves.disk.snapshots == (), "of which nobody heard"


def test_one_of_which_nobody_hears_as_a_signal_comes_during_the_thaw_is_released(serves: Serving) -> None:
    @contextmanager
    def interrupted() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_served_snapshot(serves.disk.store, [NAME], "monday", quiesced=interrupted)
    assert serves.disk.snapshots == ()


@pytest.mark.parametrize("bound", [False, True])
def test_one_for_whose_answer_there_is_no_memory_is_released(
    serves: Serving, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    """Its caller is told that there is none, and goes on."""

    def no_memory(_: Snapshot) -> None:
        raise MemoryError

    store = serves.disk.store
    monkeypatch.setattr(Snapshot, "image_fd", property(no_memory))
    with owners.owner_of(store, serves.disk.disk) as owner:
        with pytest.raises(LmdbitmapError, match="MemoryError"):
            owner.call("snapshot", disks=[NAME], name="monday", since=[""], bound=bound, once=False)
        owner.call("info")
        assert serves.disk.snapshots == ()


@pytest.mark.parametrize("what", ["snapshot", "checkpoint", "backup"])
def test_a_freeze_may_take_longer_than_an_owner_waits_for_a_request(
    serves: Serving, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It is connected to before the guest is frozen, and hangs up on callers that ask nothing for 10 s."""
    store, before = serves.disk.store, len(names_of(serves))

    @contextmanager
    def slowly() -> Iterator[None]:
        monkeypatch.setattr(control_client, "_FRESH_S", 0)
        for thread in threading.enumerate():
            if thread.name == "lmdbitmap caller":
                thread.hang_up()  # type: ignore[attr-defined]
                thread.join(PATIENCE_SECONDS)
        yield

    if what == "snapshot":
        take_served_snapshot(store, [NAME], "monday", quiesced=slowly)
    elif what == "checkpoint":
        operations.checkpoint(store, [NAME], "monday", quiesced=slowly)
    else:
        backup(store, [NAME], str(folder / "backups"), quiesced=slowly)
    assert len(names_of(serves)) == before + 1


def names_of(serves: Serving) -> list[str]:
    with serves.disk.store.read() as reader:
        return [made.name for made in reader.checkpoints(serves.disk.disk.uuid)]


def test_one_that_is_released_before_it_is_exported_leaves_no_export(
    serves: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held before the image is flushed, and exported after that: so long that who asked may have given up."""
    disk, store = serves.disk, serves.disk.store
    flush = disk.device.flush

    def released_meanwhile() -> None:
        if disk.snapshots:
            release_served_snapshot(store, NAME, "monday")
        flush()

    monkeypatch.setattr(disk.device, "flush", released_meanwhile)
    with pytest.raises(Busy, match="'sda' was released while it was made"):
        take_served_snapshot(store, [NAME], "monday")
    monkeypatch.undo()
    disk.forget("monday")
    [held] = take_served_snapshot(store, [NAME], "monday")
    with open_served_snapshot(store, held) as device:
        assert device.pread(3, 0) == bytes(3)


def test_nothing_of_what_a_caller_released_is_kept_beside_its_next_one(serves: Serving) -> None:
    """An agent may never hang up, and make all of its backups on one connection."""
    taken = []
    owner = reach(serves.disk.store.control_path(serves.disk.disk.uuid))
    assert owner is not None
    with owner:
        for name in ("monday", "tuesday", "wednesday"):
            owner.call("snapshot", disks=[NAME], name=name, since=[""], bound=True, once=True)
            taken.append(weakref.ref(serves.disk.snapshots[-1]))
            if name != "wednesday":
                owner.call("release", disk=NAME, checkpoint=name)
        gc.collect()
        assert [snapshot() is None for snapshot in taken] == [True, True, False]


@pytest.mark.parametrize("seconds", [0, float("nan"), float("inf")])
def test_a_limit_is_a_time_that_passes(serves: Serving, seconds: float) -> None:
    with pytest.raises(InvalidArgument, match="are no time limit"):
        take_served_snapshot(serves.disk.store, [NAME], "never", freeze_limit_s=seconds)


def test_no_disk_at_all_is_not_held(tracked: TrackedDisk) -> None:
    with pytest.raises(InvalidArgument, match="name the disks"):
        take_served_snapshot(tracked.store, [], "monday")


def test_a_disk_that_nobody_serves_is_not_held(tracked: TrackedDisk) -> None:
    with pytest.raises(NotFound, match="disk 'sda' is not served; serve it"):
        take_served_snapshot(tracked.store, [NAME], "monday")
    with pytest.raises(NotFound, match="disk 'sda' is not served; a snapshot ends with its server: discard"):
        release_served_snapshot(tracked.store, NAME, "monday")
    with pytest.raises(NotFound, match="no disk is called 'sdx'"):
        take_served_snapshot(tracked.store, [NAME, "sdx"], "monday")
    with tracked.attach(), pytest.raises(Busy, match="owned by a process that does not serve it"):
        take_served_snapshot(tracked.store, [NAME], "monday")
