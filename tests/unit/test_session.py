"""Owning a disk for a moment: adding, vouching, reconciling, removing, and what the image's clock may hide."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.errors import AlreadyExists, Busy, InvalidArgument, NotFound, StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.identity import identity_to_keep
from lmdbitmap.interfaces import ImageIdentity
from lmdbitmap.storage import owner, owner_file, schema
from lmdbitmap.store import Store
from lmdbitmap.targets.target import refuse_tracked
from lmdbitmap.tracker import session
from tests.helpers.support import make_raw_image
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, trust_of

BLOCK = 4096
SIZE = 100 * BLOCK
SECOND_NS = 1_000_000_000


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[TrackedDisk]:
    with closing(TrackedDisk(tmp_path, SIZE).clean()) as tracked:
        yield tracked


# --- the image's clock ---


class CoarseDevice(FileDevice):
    """An image on a file system whose times move in steps of `step_ns`, as its kernel's clock stands now."""

    step_ns = 1

    def identity(self) -> ImageIdentity:
        now_ns = time.clock_gettime_ns(5)
        return super().identity()._replace(mtime_ns=now_ns - now_ns % self.step_ns)


@pytest.mark.parametrize("step_ns", [1, 100, 1000, SECOND_NS // 100, 2 * SECOND_NS])
def test_identity_is_kept_when_no_later_write_can_leave_the_same(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch, step_ns: int
) -> None:
    monkeypatch.setattr(CoarseDevice, "step_ns", step_ns)
    with closing(CoarseDevice.open(tracked.image)) as device:
        kept = identity_to_keep(device)
        assert device.identity().mtime_ns > kept.mtime_ns


@pytest.mark.parametrize("mtime_ns", [0, 12345, 10 * SECOND_NS, 2**62])
def test_old_and_future_times_are_not_waited_for(tracked: TrackedDisk, mtime_ns: int) -> None:
    os.utime(tracked.image, ns=(mtime_ns, mtime_ns))
    with closing(FileDevice.open(tracked.image)) as device:
        assert identity_to_keep(device).mtime_ns == mtime_ns


@pytest.mark.parametrize("call", ["fstat", "fsync"])
def test_image_that_shows_no_identity_is_named(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with closing(FileDevice.open(tracked.image)) as device, monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StorageError, match=f"^{re.escape(str(tracked.image))}: Stale file handle"):
            identity_to_keep(device)


def test_identity_is_kept_only_with_its_mtime_on_the_disk(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fdatasync leaves it in memory, and a power cut would set it back."""
    fsync, synced = os.fsync, []

    def watched(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    disk = tracked.attach()
    assert synced == []
    disk.detach()
    assert synced == [tracked.image.stat().st_ino]


def test_write_right_after_a_detach_is_noticed(tracked: TrackedDisk) -> None:
    noticed = 0
    for number in range(20):
        disk = tracked.attach()
        since = f"c{number}"
        disk.checkpoint(since)
        disk.pwrite(b"ours", number * BLOCK)
        with tracked.image.open("r+b", buffering=0) as image:
            disk.detach()
            image.write(b"stranger's")
        assert trust_of(tracked.changes(since)) is Trust.UNTRUSTED
        noticed += 1
    assert noticed == 20


# --- adding and removing ---


def test_added_disk_has_an_owners_file_and_is_trusted(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, SIZE)) as tracked:
        path = tracked.store.owner_path(tracked.disk().uuid)
        assert owner_file.distrust(path) is None
        assert not owner.is_owned(path)
        assert tracked.disk().image == os.path.realpath(tracked.image)


@pytest.mark.parametrize("mode", ["durability", "policy"])
def test_a_mode_that_there_is_not_is_refused(tracked: TrackedDisk, tmp_path: Path, mode: str) -> None:
    other = make_raw_image(tmp_path / "other", SIZE)
    with pytest.raises(InvalidArgument, match="'quick' is no mode of a disk; name one of "):
        session.add(tracked.store, "other", str(other), granularity_bits=12, **{mode: "quick"})  # type: ignore[arg-type]


def test_image_that_somebody_writes_cannot_be_added(tmp_path: Path, tracked: TrackedDisk) -> None:
    image = tmp_path / "busy.raw"
    image.write_bytes(bytes(SIZE))
    with closing(FileDevice.open(image)), pytest.raises(Busy):
        session.add(tracked.store, "sdb", str(image), granularity_bits=12)
    with pytest.raises(NotFound):
        session.add(tracked.store, "sdb", str(tmp_path / "none"), granularity_bits=12)
    with pytest.raises(AlreadyExists):
        session.add(tracked.store, NAME, str(image), granularity_bits=12)
    session.add(tracked.store, "sdb", str(image), granularity_bits=12)


def test_same_image_by_another_name_is_the_same_image(tmp_path: Path, tracked: TrackedDisk) -> None:
    (tmp_path / "link").symlink_to(tracked.image)
    with pytest.raises(AlreadyExists):
        session.add(tracked.store, "sdb", str(tmp_path / "link"), granularity_bits=12)


@pytest.mark.parametrize(
    "act",
    [
        lambda store, image: session.add(store, "sdb", image, granularity_bits=12),
        lambda store, image: session.relocate(store, NAME, image),
        refuse_tracked,
    ],
    ids=["add", "relocate", "restore"],
)
def test_no_view_is_open_while_hosts_are_looked_up(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch, act: Callable[[Store, str], object]
) -> None:
    """A name server may hang, and the file grows meanwhile; its map could not grow for the guests of this process."""
    store, views = tracked.store, list[list[tuple[int, int]]]()

    def look_up(host: str, port: int, **_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        views.append(store._environment.readers())
        return [(0, 0, 0, "", ("10.0.0.7", port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    session.add(
        store,
        "far",
        "nbd://store/",
        granularity_bits=12,
        open_device=lambda _: FileDevice.open(tracked.image),
    )
    with pytest.raises(AlreadyExists):
        act(store, "nbd://store.lan/")
    assert views == [[], []]


def test_removed_disk_is_gone_without_its_image(tracked: TrackedDisk) -> None:
    path = tracked.store.owner_path(tracked.disk().uuid)
    tracked.image.unlink()
    session.remove(tracked.store, NAME)
    assert not os.path.exists(path)
    with pytest.raises(NotFound):
        session.remove(tracked.store, NAME)


def test_lost_owners_file_is_distrust_until_the_next_owner(tracked: TrackedDisk) -> None:
    os.unlink(tracked.store.owner_path(tracked.disk().uuid))
    assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED
    tracked.attach().detach()
    assert tracked.disk().epoch_number == 2
    assert "missing" in tracked.disk().epoch_reason
    assert trust_of(tracked.changes("epoch-2")) is not Trust.UNTRUSTED


# --- where it is ---


def test_image_that_was_moved_within_its_file_system_is_known_again(
    tmp_path: Path, tracked: TrackedDisk
) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x", 3 * BLOCK)
    os.rename(tracked.image, tmp_path / "moved.raw")
    moved = session.relocate(tracked.store, NAME, str(tmp_path / "moved.raw"))
    assert moved == tracked.disk()
    assert moved.image == str(tmp_path / "moved.raw")
    assert trust_of(tracked.changes("start")) is Trust.EXACT
    assert 3 in blocks_of(tracked.changes("start"))
    tracked.attach().detach()
    assert tracked.disk().epoch_number == 1


def test_image_that_was_moved_while_its_owner_was_dead_is_known_again(
    tmp_path: Path, tracked: TrackedDisk
) -> None:
    disk = tracked.attach()
    disk.pwrite(b"x", 0)
    disk.abandon()
    os.rename(tracked.image, tmp_path / "moved.raw")
    session.relocate(tracked.store, NAME, str(tmp_path / "moved.raw"))
    assert trust_of(tracked.changes("start")) is Trust.SUPERSET


def test_copy_is_another_image_until_somebody_vouches_for_it(tmp_path: Path, tracked: TrackedDisk) -> None:
    with tracked.attach() as disk:
        disk.pwrite(b"x", 3 * BLOCK)
    shutil.copy2(tracked.image, tmp_path / "copy.raw")
    session.relocate(tracked.store, NAME, str(tmp_path / "copy.raw"))
    assert trust_of(tracked.changes("start")) is Trust.UNTRUSTED
    session.adopt(tracked.store, NAME)
    assert trust_of(tracked.changes("start")) is Trust.EXACT
    assert 3 in blocks_of(tracked.changes("start"))


def test_image_that_somebody_grew_by_a_terabyte_begins_an_epoch_without_a_record(
    tracked: TrackedDisk,
) -> None:
    """In each period of the old epoch it would be 65,536, for which all disks of the store wait."""
    os.truncate(tracked.image, 1 << 40)
    with tracked.attach() as disk:
        assert (disk.size, disk.disk.epoch_number) == (1 << 40, 2)
    with tracked.store.read() as reader:
        assert reader.record_count("regions") == 0


def test_disk_stays_where_it_is_if_nothing_else_can_be_tracked_there(
    tmp_path: Path, tracked: TrackedDisk
) -> None:
    before, other = tracked.disk(), tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))
    session.add(tracked.store, "sdb", str(other), granularity_bits=12)
    for image, refusal in (
        (other, AlreadyExists),
        (tmp_path / "none", NotFound),
        (tmp_path, InvalidArgument),
    ):
        with pytest.raises(refusal):
            session.relocate(tracked.store, NAME, str(image))
    assert tracked.disk() == before
    assert session.relocate(tracked.store, NAME, str(tracked.image)) == before


def test_where_it_is_now_is_in_the_description_that_outlives_a_damaged_store(
    tmp_path: Path, tracked: TrackedDisk
) -> None:
    os.rename(tracked.image, tmp_path / "moved.raw")
    moved = session.relocate(tracked.store, NAME, str(tmp_path / "moved.raw"))
    kept = owner_file.description(tracked.store.owner_path(moved.uuid))
    assert kept == schema.encode(schema.portrait(moved))


# --- reconciling ---


@pytest.mark.parametrize("durability", schema.DURABILITIES)
@pytest.mark.parametrize("before", ["detached", "dead", "a stranger"])
def test_reconciled_disk_is_as_after_an_attach_and_has_no_session(
    tmp_path: Path, durability: str, before: str
) -> None:
    with closing(TrackedDisk(tmp_path, SIZE, durability=durability).clean()) as tracked:
        disk = tracked.attach()
        disk.pwrite(b"x", 0)
        disk.abandon() if before == "dead" else disk.detach()
        if before == "a stranger":
            tracked.write_behind_our_back(b"x", BLOCK)
        with session.owning(tracked.store, NAME) as held:
            reconciled = session.reconcile(tracked.store, held)
        lost = before == "a stranger" or (before == "dead" and durability == schema.DEFERRED)
        assert reconciled.session is None
        assert reconciled.epoch_number == (2 if lost else 1)
        assert 0 in blocks_of(tracked.changes())
        if not lost:
            assert trust_of(tracked.changes("start")) is (Trust.SUPERSET if before == "dead" else Trust.EXACT)


def test_a_disk_whose_image_is_closed_with_an_error_is_let_go(
    tracked: TrackedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system may report."""
    close = FileDevice.close

    def complain(device: FileDevice) -> None:
        close(device)
        raise OSError(errno.EIO, "by intent")

    with monkeypatch.context() as patched:
        patched.setattr(FileDevice, "close", complain)
        with pytest.raises(OSError, match="by intent"), session.owning(tracked.store, NAME):
            pass
    tracked.attach().detach()


def test_disk_can_be_owned_again_after_a_failure_inside(tracked: TrackedDisk) -> None:
    with pytest.raises(ZeroDivisionError), session.owning(tracked.store, NAME):
        raise ZeroDivisionError
    with tracked.attach(), pytest.raises(Busy), session.owning(tracked.store, NAME):
        pass
    with pytest.raises(NotFound), session.owning(tracked.store, "sdz"):
        pass
