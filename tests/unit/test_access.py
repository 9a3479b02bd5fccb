"""How a job gets at disks that another process serves: what it may believe of an owner that did not answer."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.access import routes
from lmdbitmap.access.routes import ServedElsewhere
from lmdbitmap.access.through_owner import open_held
from lmdbitmap.backups.backup import backup
from lmdbitmap.errors import Busy, InvalidArgument, NotFound, OwnerGone, StorageError
from lmdbitmap.filter import Filter
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.control import control
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.unfinished import Unfinished
from lmdbitmap.store import Store
from lmdbitmap.streams.stream import stream_backup
from lmdbitmap.tracker import chain, session
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.snapshot import Snapshot
from tests.helpers.serving import serving as serving_tracked
from tests.helpers.support import PATIENCE_SECONDS, make_raw_image
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

SIZE = 100 * 4096


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def served(folder: Path) -> Iterator[Filter]:
    with serving(folder) as disk:
        yield disk


@contextmanager
def serving(folder: Path, holding: type[HeldSnapshots] = HeldSnapshots) -> Iterator[Filter]:
    with serving_tracked(TrackedDisk(folder, SIZE).clean(), folder, holding) as serves:
        yield serves.disk


def test_nothing_is_called_forgotten_while_a_request_may_be_under_way(served: Filter) -> None:
    """A checkpoint that was asked for, by a run that gives up, may be made after that run has looked for it."""
    with closing(ServedElsewhere(served.store, [NAME])) as route:
        with pytest.raises(Busy, match="did not answer"):
            route._client.call("info", timeout_s=0)
        with pytest.raises(Busy, match="has not answered"):
            route.forget(served.disk, lambda checkpoint: False)


@contextmanager
def reached(how: str, folder: Path) -> Iterator[tuple[Store, dict[str, Filter] | None]]:
    """A disk at rest, attached here or served, and what to give as `attached`."""
    with ExitStack() as stack:
        tracked = TrackedDisk(folder, SIZE).clean()
        if how == "served":
            yield stack.enter_context(serving_tracked(tracked, folder)).disk.store, None
            return
        stack.enter_context(closing(tracked))
        here = {NAME: stack.enter_context(tracked.attach())} if how == "attached" else None
        yield tracked.store, here


@pytest.mark.parametrize("how", ["at rest", "attached", "served"])
def test_a_point_that_fails_while_the_guest_is_thawed_is_taken_back(folder: Path, how: str) -> None:
    """As by a Ctrl-C. Its name is the caller's own: nobody else would know whose it is, and the next run wants it."""

    @contextmanager
    def interrupted() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    with reached(how, folder) as (store, attached):
        before = checkpoints_of(store)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                stream_backup(
                    store, NAME, io.BytesIO(), checkpoint="monday", attached=attached, quiesced=interrupted
                )
            assert checkpoints_of(store) == before
        stream_backup(store, NAME, io.BytesIO(), checkpoint="monday", attached=attached)


def test_a_point_that_cannot_be_opened_is_taken_back(served: Filter, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise Busy("the NBD server has too many clients", next_step="try again")

    before = checkpoints_of(served.store)
    monkeypatch.setattr(routes, "open_held", full)
    with pytest.raises(Busy, match="too many clients"):
        stream_backup(served.store, NAME, io.BytesIO(), checkpoint="monday")
    assert checkpoints_of(served.store) == before
    assert served.snapshots == ()


def checkpoints_of(store: Store) -> list[str]:
    with store.read() as reader:
        return [member.name for member in reader.checkpoints(chain.find_disk(reader, NAME).uuid)]


def test_snapshot_is_read_through_a_connection_that_the_owner_hands_over(served: Filter) -> None:
    served.pwrite(b"old", 0)
    with closing(ServedElsewhere(served.store, [NAME])) as route:
        (point,) = route.take_point("now", [None])
        served.pwrite(b"new", 0)
        assert point.device.pread(3, 0) == b"old"
        route.prove(point)
    assert served.snapshots == ()


@pytest.mark.parametrize("swapped", [False, True])
def test_no_disk_goes_by_the_name_of_another(folder: Path, *, swapped: bool) -> None:
    """A stream of the wrong disk would be taken for the right one's."""
    disk = TrackedDisk(folder, SIZE)
    session.add(disk.store, "sdb", str(make_raw_image(folder / "sdb.raw", SIZE)), granularity_bits=12)
    with closing(disk), disk.attach() as sda, Filter.attach(disk.store, "sdb", background=False) as sdb:
        attached = {NAME: sdb, "sdb": sda} if swapped else {NAME: sdb}
        before = disk.checkpoints()
        with pytest.raises(
            InvalidArgument, match=f"given as disk '{NAME}' .* attached to another disk, 'sdb'"
        ):
            stream_backup(disk.store, NAME, io.BytesIO(), attached=attached)
        with pytest.raises(InvalidArgument, match="attached to another disk"):
            backup(disk.store, list(attached), folder / "backups", attached=attached)
        assert disk.checkpoints() == before
    assert not (folder / "backups").exists()


def test_no_disk_goes_by_the_name_of_one_in_another_store(folder: Path) -> None:
    for name in ("one", "other"):
        (folder / name).mkdir()
    one, other = TrackedDisk(folder / "one", SIZE), TrackedDisk(folder / "other", SIZE)
    refusal = r"of .*/one/store is attached to another disk, .*/other/store"
    with (
        closing(one),
        closing(other),
        other.attach() as attached,
        pytest.raises(InvalidArgument, match=refusal),
    ):
        backup(one.store, [NAME], folder / "backups", attached={NAME: attached})


class HangsUp(HeldSnapshots):
    """Hands connections over that are at their end."""

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.close()
        return theirs


def test_connection_that_ends_before_anything_was_read_is_one_sentence(folder: Path) -> None:
    with (
        serving(folder, HangsUp) as disk,
        closing(ServedElsewhere(disk.store, [NAME])) as route,
        pytest.raises(
            OwnerGone, match=r"through the process that serves it: its connection was lost \(the NBD server"
        ),
    ):
        route.take_point("now", [None])


class Narrow(HeldSnapshots):
    """Has room for a block of old data."""

    def __init__(self, filters: Mapping[str, Filter], server: Server | None, scratch: Scratch) -> None:
        super().__init__(filters, server, scratch._replace(limit_bytes=4096))


def test_backup_whose_snapshot_broke_says_so(folder: Path) -> None:
    """And not that the disk fails, which is what the owner's NBD server can say of it."""
    with serving(folder, Narrow) as disk:
        disk.pwrite(b"old" * (SIZE // 3), 0)

        with pytest.raises(StorageError, match=r"scratch file is full.*make the backup again"):
            backup(disk.store, [NAME], folder / "backups", quiesced=partial(after, disk))
        assert disk.snapshots == ()


def test_backup_whose_snapshot_broke_after_the_last_read_is_none_either(folder: Path) -> None:
    with serving(folder, Narrow) as disk:
        disk.pwrite(b"old" * (SIZE // 3), 0)

        def break_at_the_end(done: int, total: int) -> None:
            """No write could: nothing is kept any more of what was read."""
            if done == total:
                [held] = disk.snapshots
                held._break("its scratch file is full")

        with pytest.raises(StorageError, match=r"scratch file is full.*make the backup again"):
            backup(disk.store, [NAME], folder / "backups", progress=break_at_the_end)


@contextmanager
def after(disk: Filter) -> Iterator[None]:
    """Writes as soon as the moment was taken."""
    yield
    disk.pwrite(b"new" * 4096, 0)


class Stuck(HeldSnapshots):
    """Releases nothing before it is let go."""

    let_go = threading.Event()
    was_let_go = True

    def release(self, snapshot: Snapshot) -> None:
        Stuck.was_let_go = self.let_go.wait(PATIENCE_SECONDS)
        super().release(snapshot)


def test_who_gives_up_does_not_wait_for_an_owner_that_hangs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "LAST_WORD_S", 0.01)
    with serving(folder, Stuck) as disk, closing(ServedElsewhere(disk.store, [NAME])) as route:
        route.take_point("now", [None])
        route.end_reading()
        assert Stuck.was_let_go
        assert disk.snapshots != ()
        Stuck.let_go.set()


class Slow(HeldSnapshots):
    """Takes nothing before it is let go."""

    let_go = threading.Event()

    def take(self, disks: Sequence[str], name: str, *, private: bool = False) -> list[Snapshot]:
        self.let_go.wait(PATIENCE_SECONDS)
        return super().take(disks, name, private=private)


def test_a_guest_is_kept_frozen_no_longer_than_was_said(folder: Path) -> None:
    """The owner, which comes to it later, lets go of it at once, as nobody is there any more."""
    steps: list[str] = []

    @contextmanager
    def frozen() -> Iterator[None]:
        steps.append("frozen")
        try:
            yield
        finally:
            steps.append(f"thawed before the owner answered: {not Slow.let_go.is_set()}")

    with serving(folder, Slow) as disk:
        with pytest.raises(Busy, match="did not answer within"):
            backup(disk.store, [NAME], folder / "backups", quiesced=frozen, freeze_limit_s=0.05)
        assert steps == ["frozen", "thawed before the owner answered: True"]
        Slow.let_go.set()
        await_callers(0)
        assert disk.snapshots == ()


def test_no_guest_is_frozen_while_the_way_to_its_snapshot_is_opened(
    served: Filter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    @contextmanager
    def frozen() -> Iterator[None]:
        steps.append("frozen")
        yield
        steps.append("thawed")

    def opened(*held: Any) -> object:
        steps.append("opened")
        return open_held(*held)

    monkeypatch.setattr(routes, "open_held", opened)
    backup(served.store, [NAME], folder / "backups", quiesced=frozen)
    assert steps == ["frozen", "thawed", "opened"]


class Late(HeldSnapshots):
    """Takes the first point when it is let go; its backup has given up by then."""

    let_go = threading.Event()
    took = threading.Event()

    def take(self, disks: Sequence[str], name: str, *, private: bool = False) -> list[Snapshot]:
        self.let_go.wait(PATIENCE_SECONDS)
        taken = super().take(disks, name, private=private)
        self.took.set()
        return taken


@pytest.mark.parametrize("later", ["made", "refused and then made"])
def test_a_checkpoint_that_comes_when_its_backup_is_gone_goes_with_the_next_backup(
    folder: Path, later: str
) -> None:
    """Whose first look at what the dead one left does not find it yet."""

    def refused() -> AbstractContextManager[object]:
        raise Busy("the guest does not listen", next_step="ask it again")

    @contextmanager
    def when_the_late_one_is_there() -> Iterator[None]:
        assert len(backups_of(disk)) == 1
        Late.let_go.set()
        assert Late.took.wait(PATIENCE_SECONDS)
        await_release(disk)
        yield

    with serving(folder, Late) as disk:
        Late.let_go.set()
        [first] = backup(disk.store, [NAME], folder / "backups")
        Late.let_go.clear()
        Late.took.clear()
        with pytest.raises(Busy, match="did not answer within"):
            backup(disk.store, [NAME], folder / "backups", freeze_limit_s=0.05)
        if later != "made":
            with pytest.raises(Busy, match="does not listen"):
                backup(disk.store, [NAME], folder / "backups", quiesced=refused)
        [made] = backup(disk.store, [NAME], folder / "backups", quiesced=when_the_late_one_is_there)
        assert backups_of(disk) == [first.entry.checkpoint.name, made.entry.checkpoint.name]
        assert "unfinished" not in os.listdir(folder / "backups" / NAME)


class LateToRelease(Late):
    """The owner of a backup that is gone is slow to notice that."""

    releases = threading.Event()

    def release(self, snapshot: Snapshot) -> None:
        assert self.releases.wait(PATIENCE_SECONDS)
        super().release(snapshot)


def test_a_snapshot_that_a_backup_left_does_not_keep_the_next_one_from_its_work(folder: Path) -> None:
    """Its checkpoint goes when nobody holds it any more."""

    @contextmanager
    def when_it_is_released() -> Iterator[None]:
        assert len(backups_of(disk)) == 2
        LateToRelease.releases.set()
        await_release(disk)
        yield

    with serving(folder, LateToRelease) as disk:
        Late.let_go.set()
        LateToRelease.releases.set()
        [first] = backup(disk.store, [NAME], folder / "backups")
        for event in (LateToRelease.releases, Late.let_go, Late.took):
            event.clear()
        with pytest.raises(Busy, match="did not answer within"):
            backup(disk.store, [NAME], folder / "backups", freeze_limit_s=0.05)
        Late.let_go.set()
        assert Late.took.wait(PATIENCE_SECONDS)
        [made] = backup(disk.store, [NAME], folder / "backups", quiesced=when_it_is_released)
        assert backups_of(disk) == [first.entry.checkpoint.name, made.entry.checkpoint.name]
        assert "unfinished" not in os.listdir(folder / "backups" / NAME)


def test_what_is_held_for_a_backup_that_gave_up_until_the_next_one_is_made_stays_and_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(folder, Late) as disk:
        Late.let_go.set()
        abandoned = disk.snapshot(Maker.BACKUP.new_name(1), Scratch(str(folder)))
        left = BackupFolder(folder / "backups", NAME)
        with left.locked():
            left.note_unfinished([Unfinished(abandoned.checkpoint.name, "000009-full.qcow2")])
        [made] = backup(disk.store, [NAME], folder / "backups")
        assert abandoned.checkpoint.name in backups_of(disk)
        assert f"checkpoint {abandoned.checkpoint.name} of a backup that gave up is held still" in caplog.text
        assert made.entry.checkpoint.name in backups_of(disk)


def backups_of(disk: Filter) -> list[str]:
    with disk.store.read() as reader:
        return [one.name for one in reader.checkpoints(disk.disk.uuid) if Maker.BACKUP.named(one.name)]


def test_a_served_backup_that_is_refused_leaves_no_note(folder: Path) -> None:
    def refused() -> AbstractContextManager[object]:
        raise Busy("the guest does not listen", next_step="ask it again")

    with serving(folder) as disk:
        with pytest.raises(Busy, match="does not listen"):
            backup(disk.store, [NAME], folder / "backups", quiesced=refused)
        assert not (folder / "backups").exists()


class Unsteady(HeldSnapshots):
    """Loses track as soon as a snapshot is taken."""

    def take(self, disks: Sequence[str], name: str, *, private: bool = False) -> list[Snapshot]:
        taken = super().take(disks, name, private=private)
        self._filters[NAME].start_epoch("by intent")
        return taken


@pytest.mark.parametrize("limit", ["owner_limit_s", "freeze_limit_s"])
@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e8])
def test_a_limit_is_a_time_that_passes(folder: Path, limit: str, seconds: float) -> None:
    with closing(TrackedDisk(folder, 4096)) as disk:
        with pytest.raises(InvalidArgument, match="are no time limit"):
            backup(disk.store, [NAME], folder / "repository", **{limit: seconds})  # type: ignore[arg-type]
        assert not (folder / "repository").exists()


def test_backup_is_of_the_epoch_of_its_checkpoint(folder: Path) -> None:
    """A new one that begins meanwhile is not its own, and the next backup says so."""
    with serving(folder, Unsteady) as disk:
        [full] = backup(disk.store, [NAME], folder / "backups")
        assert full.entry.epoch != disk.disk.epoch
    with closing(Store.open(str(folder / "store"))) as store:
        [later] = backup(store, [NAME], folder / "backups")
    assert later.entry.reason is not None
    assert later.entry.reason.code == "new-epoch"


def test_caller_that_hangs_up_takes_no_later_snapshot_of_that_name_with_it(served: Filter) -> None:
    """Its own was released, and the checkpoint forgotten, long before."""
    with (
        closing(ServedElsewhere(served.store, [NAME])) as early,
        closing(ServedElsewhere(served.store, [NAME])) as late,
    ):
        early.prove(*early.take_point("now", [None]))
        served.forget("now")
        (point,) = late.take_point("now", [None])
        early.close()
        await_callers(1)
        assert point.device.pread(3, 0) == bytes(3)
        late.prove(point)


def test_a_disk_that_is_removed_meanwhile_is_told_of(served: Filter) -> None:
    with closing(ServedElsewhere(served.store, [NAME])) as route:
        served.store.update(lambda writer: chain.remove_disk(writer, served.disk))
        with pytest.raises(NotFound, match="was removed meanwhile"):
            route.take_point("now", [None])


def await_release(disk: Filter) -> None:
    """Return when nothing of the disk is held."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while disk.snapshots:
        assert time.monotonic() < deadline


def await_callers(count: int) -> None:
    """Return when so many threads of callers are left."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while sum(thread.name == "lmdbitmap caller" for thread in threading.enumerate()) > count:
        assert time.monotonic() < deadline


def test_backups_leave_room_for_other_callers(served: Filter) -> None:
    with ExitStack() as backups:
        for number in range(control.MAX_CALLERS):
            route = backups.enter_context(closing(ServedElsewhere(served.store, [NAME])))
            route.take_point(f"point-{number}", [None])
        path = served.store.control_path(served.disk.uuid)
        assert len(control_client.call(path, "info")["disks"][0]["snapshots"]) == control.MAX_CALLERS
        with pytest.raises(Busy, match="holds 16 snapshots"):
            control_client.call(
                path, "snapshot", disks=[NAME], name="one more", since=[""], bound=True, once=False
            )


def test_a_backup_that_has_released_all_takes_a_callers_place_again(served: Filter) -> None:
    """Else whoever stays after it has read, and asks for nothing more, would be beside every limit."""
    path = served.store.control_path(served.disk.uuid)
    with ExitStack() as backups:
        for number in range(control.MAX_CALLERS):
            route = backups.enter_context(closing(ServedElsewhere(served.store, [NAME])))
            route.prove(*route.take_point(f"point-{number}", [None]))
        with pytest.raises(Busy, match="too many callers"):
            control_client.call(path, "info")
    await_callers(0)
    assert control_client.call(path, "info")["disks"][0]["snapshots"] == []


def test_a_snapshot_that_cannot_be_released_keeps_neither_the_others_nor_its_caller(
    served: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = served.store.control_path(served.disk.uuid)
    release, lacks = HeldSnapshots.release, [MemoryError()]

    def fail_first(held: HeldSnapshots, snapshot: Snapshot) -> None:
        if lacks:
            raise lacks.pop()
        release(held, snapshot)

    caller = control_client.reach(path)
    assert caller is not None
    with caller:
        for name in ("one", "two"):
            caller.call("snapshot", disks=[NAME], name=name, since=[""], bound=True, once=False)
        monkeypatch.setattr(HeldSnapshots, "release", fail_first)
    await_callers(0)
    assert [snapshot.checkpoint.name for snapshot in served.snapshots] == ["one"]
    assert control_client.call(path, "info")["disks"][0]["snapshots"]


def test_a_snapshot_that_another_caller_releases_exempts_nobody_any_more(served: Filter) -> None:
    path = served.store.control_path(served.disk.uuid)
    with ExitStack() as callers:
        another = control_client.reach(path)
        assert another is not None
        callers.enter_context(another)
        for number in range(control.MAX_CALLERS):
            route = callers.enter_context(closing(ServedElsewhere(served.store, [NAME])))
            route.take_point(f"point-{number}", [None])
        for number in range(control.MAX_CALLERS):
            another.call("release", disk=NAME, checkpoint=f"point-{number}")
        with pytest.raises(Busy, match="too many callers"):
            control_client.call(path, "info")
