"""A second copy of a disk: what is copied and why, what is refused, and what a failure leaves."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    InvalidArgument,
    NotFound,
    StorageError,
    Untrusted,
)
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import DeviceTrace, ImageIdentity, TrackableDevice
from lmdbitmap.notes import sync_note
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.restoring.restore import restore
from lmdbitmap.store import Store
from lmdbitmap.streams.rbd_diff import Encoder, Head
from lmdbitmap.streams.restore import apply_stream
from lmdbitmap.syncs.plan import SyncKind, gap_between
from lmdbitmap.syncs.sync import SyncResult, sync
from lmdbitmap.tracker import session
from lmdbitmap.tracker.scratch import Scratch
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.nbd_far import FarServer, crashing_at_first
from tests.helpers.nbd_raw import WRITE
from tests.helpers.support import make_raw_image, no_ascii
from tests.helpers.tracked import LATER_NS, NAME

BLOCK = 4096
SIZE = 50 * BLOCK + 100
INCREMENTAL, COMPARE, FULL = SyncKind


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(no_ascii(10 * BLOCK), BLOCK)
    yield made
    made.close()


@pytest.fixture
def copy(disk: BackedUpDisk) -> Path:
    """A copy that is up to date."""
    path = disk.folder / "copy.raw"
    assert synced(disk, path).kind is FULL
    return path


def synced(disk: BackedUpDisk, target: Path | str, *, compare: bool = False) -> SyncResult:
    """Synced, and what it must be; of the checkpoints of syncs only the newest is left, for each target one."""
    result = sync(disk.store, NAME, target, compare=compare)
    if isinstance(target, Path):
        assert target.read_bytes() == disk.content()
    assert result.checkpoint == disk.checkpoints()[-1]
    assert result.size == len(disk.content())
    held = {note.at.name for _, note in sync_note.notes(disk.store.path) if note.at is not None}
    assert {name for name in disk.checkpoints() if Maker.SYNC.named(name)} == held
    return result


def reason(result: SyncResult) -> str | None:
    return None if result.reason is None else result.reason.code


def write_as_a_stranger(path: Path, data: bytes, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# --- what is copied ---


def test_a_new_copy_is_made_whole_and_sparse(disk: BackedUpDisk) -> None:
    disk.zero(3 * BLOCK, 2 * BLOCK)
    disk.write(bytes(5 * BLOCK), 30 * BLOCK)
    result = synced(disk, disk.folder / "copy.raw")
    assert (result.kind, reason(result), result.bytes_changed) == (FULL, "first-sync", SIZE)
    assert (result.bytes_written, result.bytes_zeroed, result.bytes_compared) == (8 * BLOCK, 0, 0)
    status = (disk.folder / "copy.raw").stat()
    assert status.st_blocks * 512 <= 8 * BLOCK
    assert status.st_mode & 0o777 == 0o600


def test_afterwards_what_changed_is_copied_and_nothing_else(disk: BackedUpDisk, copy: Path) -> None:
    disk.write(b"new", 5 * BLOCK)
    disk.zero(8 * BLOCK, 2 * BLOCK)
    disk.write(b"tail", SIZE - 4)
    result = synced(disk, copy)
    assert (result.kind, result.reason, result.trust) == (INCREMENTAL, None, Trust.EXACT)
    assert result.bytes_changed == 3 * BLOCK + 100
    assert (result.bytes_written, result.bytes_zeroed) == (BLOCK + 100, 2 * BLOCK)
    assert result.bytes_read <= BLOCK + 100
    assert result.bytes_compared == 0


def test_a_copy_that_is_up_to_date_is_not_touched(disk: BackedUpDisk, copy: Path) -> None:
    before = copy.stat().st_mtime_ns
    result = synced(disk, copy)
    assert (result.kind, result.bytes_changed, result.bytes_read) == (INCREMENTAL, 0, 0)
    assert copy.stat().st_mtime_ns == before


def test_zeroes_are_holes_in_the_copy_too(disk: BackedUpDisk, copy: Path) -> None:
    before = copy.stat().st_blocks
    disk.write(bytes(10 * BLOCK), BLOCK)
    assert synced(disk, copy).bytes_zeroed == 10 * BLOCK
    assert copy.stat().st_blocks == before - 10 * BLOCK // 512


def test_each_target_counts_from_its_own_sync(disk: BackedUpDisk, copy: Path) -> None:
    other = disk.folder / "other.raw"
    disk.write(b"1", 0)
    synced(disk, other)
    disk.write(b"2", 20 * BLOCK)
    assert synced(disk, copy).bytes_changed == 2 * BLOCK
    assert synced(disk, other).bytes_changed == BLOCK


def test_a_backup_in_between_disturbs_no_sync(disk: BackedUpDisk, copy: Path) -> None:
    disk.backup()
    disk.write(b"1", 0)
    disk.backup()
    assert synced(disk, copy).bytes_changed == BLOCK
    assert disk.backup().bytes_changed == 0


@pytest.mark.parametrize("size", [5 * BLOCK + 1, 80 * BLOCK, SIZE - 1])
def test_the_copy_follows_the_size_of_the_disk(disk: BackedUpDisk, copy: Path, size: int) -> None:
    disk.resize(size)
    assert synced(disk, copy).kind is INCREMENTAL
    disk.write(b"tail", size - 4)
    assert synced(disk, copy).kind is INCREMENTAL


def test_shrunk_and_grown_again_is_not_what_it_was(disk: BackedUpDisk, copy: Path) -> None:
    disk.resize(3 * BLOCK)
    disk.resize(SIZE)
    assert synced(disk, copy).kind is INCREMENTAL


def test_a_disk_without_a_byte_has_a_copy(tmp_path: Path) -> None:
    disk = BackedUpDisk(tmp_path, 0)
    copy = tmp_path / "copy.raw"
    assert synced(disk, copy).kind is FULL
    assert synced(disk, copy).kind is INCREMENTAL
    disk.resize(2 * BLOCK)
    disk.write(b"x", BLOCK)
    assert synced(disk, copy).kind is INCREMENTAL
    disk.close()


def test_after_a_crash_more_is_copied_and_the_result_says_so(disk: BackedUpDisk, copy: Path) -> None:
    with disk.attach(max_armed=4) as attached:
        attached.pwrite(b"x", 0)
        attached.abandon()
    result = synced(disk, copy)
    assert (result.kind, result.trust) == (INCREMENTAL, Trust.SUPERSET)


def test_a_copy_is_known_by_another_name(disk: BackedUpDisk, copy: Path) -> None:
    (disk.folder / "link.raw").symlink_to(copy)
    os.link(copy, disk.folder / "hard.raw")
    assert synced(disk, disk.folder / "link.raw").kind is INCREMENTAL
    assert synced(disk, disk.folder / "hard.raw").kind is INCREMENTAL
    assert synced(disk, copy).kind is INCREMENTAL


def test_a_disk_that_we_serve_ourselves_is_synced_while_it_is_written(disk: BackedUpDisk, copy: Path) -> None:
    with disk.attach() as attached:
        attached.pwrite(b"before", 0)
        at_the_point = []

        @contextmanager
        def noted() -> Iterator[None]:
            yield
            at_the_point.append(disk.content())
            attached.pwrite(b"after!", 0)

        result = sync(disk.store, NAME, copy, attached={NAME: attached}, quiesced=noted)
        assert [copy.read_bytes()] == at_the_point != [disk.content()]
        assert result.kind is INCREMENTAL
        sync(disk.store, NAME, copy, attached={NAME: attached})
        assert copy.read_bytes() == disk.content()


@pytest.mark.parametrize("kind", SyncKind)
def test_no_room_is_needed_for_what_a_guest_overwrites_once_it_was_read(
    tmp_path: Path, kind: SyncKind
) -> None:
    """It is not read again. A backup and a stream need none for it either."""
    with contextlib.closing(BackedUpDisk(tmp_path, 6 << 20)) as disk, disk.attach() as attached:
        served, copy = {NAME: attached}, tmp_path / "copy.raw"
        if kind is not FULL:
            sync(disk.store, NAME, copy, attached=served)
        attached.pwrite(no_ascii(6 << 20), 0)
        before = disk.content()

        def overwrite(done: int, total: int) -> None:
            if done < total:
                attached.pwrite(b"x" * (1 << 20), 0)

        result = sync(
            disk.store, NAME, copy, attached=served, scratch=Scratch(tmp_path, BLOCK),
            progress=overwrite, compare=kind is COMPARE,
        )  # fmt: skip
        assert result.kind is kind
        assert copy.read_bytes() == before != disk.content()


# --- why both are read ---


def test_what_is_there_already_is_only_read(disk: BackedUpDisk) -> None:
    copy = disk.folder / "copy.raw"
    content = bytearray(disk.content())
    content[2 * BLOCK : 3 * BLOCK] = b"?" * BLOCK
    content[40 * BLOCK : 41 * BLOCK] = b"?" * BLOCK
    copy.write_bytes(content)
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (COMPARE, "first-sync")
    assert (result.bytes_written, result.bytes_zeroed, result.bytes_changed) == (BLOCK, BLOCK, 2 * BLOCK)
    assert synced(disk, copy).kind is INCREMENTAL


def test_it_can_be_asked_for(disk: BackedUpDisk, copy: Path) -> None:
    disk.write(b"x", 0)
    result = synced(disk, copy, compare=True)
    assert (result.kind, result.reason, result.bytes_written) == (COMPARE, None, BLOCK)


def test_a_new_epoch_is_compared(disk: BackedUpDisk, copy: Path) -> None:
    disk.write_behind_our_back(b"!", 30 * BLOCK)
    result = synced(disk, copy)
    assert (result.kind, reason(result), result.bytes_written) == (COMPARE, "new-epoch", BLOCK)
    assert synced(disk, copy).kind is INCREMENTAL


def test_a_forgotten_checkpoint_is_no_secret(disk: BackedUpDisk, copy: Path) -> None:
    [name] = [name for name in disk.checkpoints() if name.startswith("sync-")]
    with disk.attach() as attached:
        attached.checkpoint("mine")
        attached.forget(name)
    assert reason(synced(disk, copy)) == "checkpoint-forgotten"


def test_a_copy_that_somebody_wrote_is_compared(disk: BackedUpDisk, copy: Path) -> None:
    write_as_a_stranger(copy, b"!", 30 * BLOCK)
    disk.write(b"x", 0)
    result = synced(disk, copy)
    assert (result.kind, reason(result), result.bytes_changed) == (COMPARE, "target-changed", 2 * BLOCK)
    assert synced(disk, copy).kind is INCREMENTAL


def test_a_copy_that_was_replaced_is_compared(disk: BackedUpDisk, copy: Path) -> None:
    status = copy.stat()
    another = make_raw_image(disk.folder / "another.raw", SIZE)
    os.utime(another, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(another, copy)
    assert reason(synced(disk, copy)) == "target-changed"


def test_a_copy_that_is_gone_is_made_anew(disk: BackedUpDisk, copy: Path) -> None:
    copy.unlink()
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (FULL, "target-gone")


def test_a_note_that_cannot_be_read_says_nothing(disk: BackedUpDisk, copy: Path) -> None:
    [path] = (disk.folder / "store/syncs").glob("*.json")
    path.write_bytes(b"{}")
    result = sync(disk.store, NAME, copy)
    assert (result.kind, reason(result)) == (COMPARE, "first-sync")


def test_a_note_of_a_newer_version_is_left_alone(disk: BackedUpDisk, copy: Path) -> None:
    [path] = (disk.folder / "store/syncs").glob("*.json")
    text = path.read_text().replace('"format_version": 1', '"format_version": 2')
    path.write_text(text)
    with pytest.raises(FormatError, match="expected version 1, found 2; update lmdbitmap"):
        sync(disk.store, NAME, copy)
    assert path.read_text() == text


def test_only_incrementally_or_not_at_all(disk: BackedUpDisk, copy: Path) -> None:
    assert sync(disk.store, NAME, copy, only_incremental=True).kind is INCREMENTAL
    write_as_a_stranger(copy, b"!", 30 * BLOCK)
    before = copy.read_bytes(), disk.checkpoints()
    with pytest.raises(Untrusted, match="incrementally: the target was written by somebody else"):
        sync(disk.store, NAME, copy, only_incremental=True)
    with pytest.raises(Untrusted, match="the disk was never synced"):
        sync(disk.store, NAME, disk.folder / "other.raw", only_incremental=True)
    assert (copy.read_bytes(), disk.checkpoints()) == before
    assert not (disk.folder / "other.raw").exists()


# --- what is refused, with nothing touched ---


def refused(disk: BackedUpDisk, target: Path | str, error: type[Exception], words: str) -> None:
    before = disk.content(), disk.checkpoints()
    with pytest.raises(error, match=words):
        sync(disk.store, NAME, target)
    assert (disk.content(), disk.checkpoints()) == before


def test_targets_that_are_no_place_for_a_copy(disk: BackedUpDisk, tmp_path: Path) -> None:
    another = make_raw_image(tmp_path / "another.raw", SIZE)
    session.add(disk.store, "sdb", str(another), granularity_bits=12)
    os.link(disk.image, tmp_path / "hard.raw")
    refused(disk, disk.image, InvalidArgument, "is the image of disk 'sda', itself")
    refused(disk, tmp_path / "hard.raw", InvalidArgument, "is the image of disk 'sda', itself")
    refused(disk, another, InvalidArgument, "is the image of disk 'sdb', and is not to be written")
    refused(disk, tmp_path / "store/copy.raw", InvalidArgument, "is inside of the store")
    disk.backup()
    refused(
        disk, tmp_path / "backups/sda/000002-incremental.qcow2", InvalidArgument, "is among the backups in"
    )
    refused(disk, tmp_path, InvalidArgument, "neither a regular file nor a block device")
    refused(disk, tmp_path / "no/copy.raw", NotFound, f"there is no folder {re.escape(str(tmp_path))}/no")
    os.mkfifo(tmp_path / "fifo")
    refused(disk, tmp_path / "fifo", InvalidArgument, "neither a regular file nor a block device")


@pytest.mark.skipif(not can_make_loop_devices(), reason="needs root and loop devices")
def test_a_disk_on_a_loop_device_and_the_file_behind_it_are_one(disk: BackedUpDisk, tmp_path: Path) -> None:
    with loop_node(tmp_path) as node:
        backing = tmp_path / "backing.raw"
        session.add(disk.store, "sdb", str(node), granularity_bits=12)
        refused(disk, backing, InvalidArgument, f"would change disk 'sdb', {node}")
        with pytest.raises(InvalidArgument, match=f"to {backing} would change disk 'sdb' itself, {node}"):
            sync(disk.store, "sdb", backing)
        session.remove(disk.store, "sdb")
        session.add(disk.store, "sdb", str(backing), granularity_bits=12)
        refused(disk, node, InvalidArgument, f"would change disk 'sdb', {backing}")
        with pytest.raises(InvalidArgument, match=f"to {node} would change disk 'sdb' itself, {backing}"):
            sync(disk.store, "sdb", node)


def test_a_file_of_another_size_that_nobody_synced_to(disk: BackedUpDisk, copy: Path) -> None:
    stranger = disk.folder / "letters"
    stranger.write_bytes(b"Dear Ada" * 1000)
    refused(disk, stranger, InvalidArgument, f"has 8000 bytes, and the disk has {SIZE}; name a new file")
    assert stranger.read_bytes() == b"Dear Ada" * 1000
    os.replace(stranger, copy)
    refused(disk, copy, InvalidArgument, "has 8000 bytes")


def test_the_copy_of_another_disk(disk: BackedUpDisk, copy: Path, tmp_path: Path) -> None:
    another = make_raw_image(tmp_path / "another.raw", SIZE)
    session.add(disk.store, "sdb", str(another), granularity_bits=12)
    before = copy.read_bytes()
    with pytest.raises(
        AlreadyExists, match="is the synced copy of disk 'sda'; name another target, or remove "
    ):
        sync(disk.store, "sdb", copy)
    assert copy.read_bytes() == before
    session.remove(disk.store, NAME)
    assert sync(disk.store, "sdb", copy).kind is COMPARE


def test_what_somebody_else_has_open(disk: BackedUpDisk, copy: Path) -> None:
    with FileDevice.open(copy):
        refused(disk, copy, Busy, "is open in QEMU or in another lmdbitmap")
    with disk.attach():
        refused(disk, copy, Busy, "is owned by a process that does not serve it")


def test_two_syncs_to_one_target_at_once(disk: BackedUpDisk, copy: Path) -> None:
    def meanwhile() -> AbstractContextManager[None]:
        refused(disk, copy, Busy, "in use")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sync(disk.store, NAME, copy, quiesced=meanwhile)


# --- what fails ---


class Failing(FileDevice):
    """Is read block by block, and fails after so many."""

    chunk_bytes = BLOCK
    reads_left = 0

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError(5, "the disk fails")
        super().pread_into(buffer, offset)


def failing_after(reads: int) -> Callable[[str], TrackableDevice]:
    def opened(image: str) -> TrackableDevice:
        device = Failing.open(image, read_only=True)
        assert isinstance(device, Failing)
        device.reads_left = reads
        return device

    return opened


def killed_after(reads: int, disk: BackedUpDisk, copy: Path) -> None:
    """Sync as a process that dies in the middle: it does not say what it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmdbitmap.syncs.sync._note_how_it_was_left", lambda job: None)
        with pytest.raises(StorageError):
            sync(disk.store, NAME, copy, open_device=failing_after(reads))


def test_what_failed_before_it_wrote_costs_nothing(disk: BackedUpDisk, copy: Path) -> None:
    """Not even the proof that nobody else wrote the target."""

    def failing() -> AbstractContextManager[None]:
        raise ValueError("no")

    points = disk.checkpoints()
    with pytest.raises(ValueError, match="no"):
        sync(disk.store, NAME, copy, quiesced=failing)
    assert disk.checkpoints() == points
    assert synced(disk, copy).kind is INCREMENTAL
    with pytest.raises(ValueError, match="no"):
        sync(disk.store, NAME, copy, quiesced=failing)
    write_as_a_stranger(copy, b"!", 30 * BLOCK)
    assert reason(synced(disk, copy)) == "target-changed"


def test_what_failed_in_the_middle_is_copied_again_with_what_changed_since(
    disk: BackedUpDisk, copy: Path
) -> None:
    disk.write(b"1", 0)
    disk.write(b"2", 20 * BLOCK)
    points = disk.checkpoints()
    with pytest.raises(StorageError, match=f"{disk.image}: "):
        sync(disk.store, NAME, copy, open_device=failing_after(1))
    assert copy.read_bytes()[:1] == b"1", "some of it was written"
    assert disk.checkpoints() == points
    disk.write(bytes(BLOCK), 0)
    result = synced(disk, copy)
    assert (result.kind, result.bytes_changed) == (INCREMENTAL, 2 * BLOCK)


def test_an_older_copy_in_the_place_of_one_that_was_being_written_is_compared(
    disk: BackedUpDisk, copy: Path
) -> None:
    older = disk.folder / "older.raw"
    shutil.copy2(copy, older)
    disk.write(b"1", 20 * BLOCK)
    synced(disk, copy)
    disk.write(b"2", 30 * BLOCK)
    killed_after(0, disk, copy)
    shutil.copy2(older, copy)
    result = synced(disk, copy)
    assert (result.kind, reason(result), result.bytes_written) == (COMPARE, "target-older", 2 * BLOCK)


@pytest.mark.parametrize("exchange", [Path.unlink, lambda path: path.write_bytes(bytes(SIZE))])
def test_a_sync_that_fails_does_not_vouch_for_what_took_the_place_of_the_copy(
    disk: BackedUpDisk, copy: Path, exchange: Callable[[Path], object]
) -> None:
    """The sync before it was killed, and this one finds that the target is not what that one left."""

    def failing() -> AbstractContextManager[None]:
        raise ValueError("no")

    disk.write(b"1", 20 * BLOCK)
    killed_after(0, disk, copy)
    copy.rename(copy.with_suffix(".aside"))
    copy.touch()
    exchange(copy)
    with pytest.raises(ValueError, match="no"):
        sync(disk.store, NAME, copy, quiesced=failing)
    assert synced(disk, copy).kind is not INCREMENTAL


def test_a_write_by_somebody_else_after_a_sync_that_failed_is_noticed(disk: BackedUpDisk, copy: Path) -> None:
    disk.write(b"1", 20 * BLOCK)
    with pytest.raises(StorageError):
        sync(disk.store, NAME, copy, open_device=failing_after(0))
    write_as_a_stranger(copy, b"!", 40 * BLOCK)
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (COMPARE, "target-changed")


@pytest.mark.skipif(not can_make_loop_devices(), reason="needs root and loop devices")
def test_a_write_to_a_device_after_a_sync_that_failed_is_noticed(disk: BackedUpDisk, tmp_path: Path) -> None:
    with loop_node(tmp_path, 64 * BLOCK) as node:
        sync(disk.store, NAME, node, larger=True)
        disk.write(b"1", 20 * BLOCK)
        with pytest.raises(StorageError):
            sync(disk.store, NAME, node, larger=True, open_device=failing_after(0))
        write_as_a_stranger(Path(node), b"!", 40 * BLOCK)
        result = sync(disk.store, NAME, node, larger=True)
        assert (result.kind, reason(result)) == (COMPARE, "target-changed")
        assert Path(node).read_bytes() == disk.content() + bytes(64 * BLOCK - SIZE)


def test_the_space_behind_the_disk_is_zeroed_after_a_sync_that_failed(disk: BackedUpDisk) -> None:
    """It may have been written when the disk was larger."""
    copy, to_do = make_raw_image(disk.folder / "larger.raw", 60 * BLOCK), []
    sync(disk.store, NAME, copy, larger=True)
    disk.write(b"1", 20 * BLOCK)
    with pytest.raises(StorageError):
        sync(disk.store, NAME, copy, larger=True, open_device=failing_after(0))
    for _ in range(2):
        result = sync(disk.store, NAME, copy, larger=True, progress=lambda done, total: to_do.append(total))
        assert result.kind is INCREMENTAL
        disk.write(b"1", 20 * BLOCK)
    assert to_do[0] == BLOCK + 60 * BLOCK - SIZE, "all of it, and only once"
    assert to_do[-1] < 2 * BLOCK


def test_a_clock_that_was_set_back_costs_a_comparison_and_no_more(disk: BackedUpDisk, copy: Path) -> None:
    disk.write(b"1", 20 * BLOCK)
    killed_after(0, disk, copy)
    os.utime(copy, ns=(0, copy.stat().st_mtime_ns - 10**10))
    disk.resize(SIZE + BLOCK)
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (COMPARE, "target-older")


def snapshot_of_files(disk: BackedUpDisk) -> dict[Path, tuple[bytes, int]]:
    """The store and the image as they are now: the content and the mtime of each file."""
    disk.store.close()
    stored = [path for path in Path(disk.store.path).rglob("*") if path.is_file()]
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (disk.image, *stored)}
    disk.store = Store.open(disk.store.path)
    return kept


def put_back(disk: BackedUpDisk, kept: dict[Path, tuple[bytes, int]]) -> None:
    """As a snapshot of the file system does: every file is what it was, inode and mtime too."""
    disk.store.close()
    for path in Path(disk.store.path).rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    for path, (content, mtime_ns) in kept.items():
        path.write_bytes(content)
        os.utime(path, ns=(mtime_ns, mtime_ns))
    disk.store = Store.open(disk.store.path)


def test_a_disk_and_store_put_back_to_an_interrupted_sync_know_of_later_syncs(
    disk: BackedUpDisk, copy: Path
) -> None:
    disk.write(b"1", 20 * BLOCK)
    killed_after(0, disk, copy)
    then = snapshot_of_files(disk)
    disk.write(b"2", 30 * BLOCK)
    assert synced(disk, copy).kind is INCREMENTAL
    put_back(disk, then)
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (COMPARE, "interrupted")
    assert result.reason is not None
    assert "another sync has begun to write the target" in result.reason.words


def test_a_mark_is_durable_before_anything_counts_on_it(
    disk: BackedUpDisk, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By fsync: a power cut after a mere fdatasync took it back on ext4, and the next sync compared."""
    calls: list[object] = []
    setxattr, fsync = os.setxattr, os.fsync

    def marked(file: int, *rest: Any) -> None:
        calls.append("mark")
        setxattr(file, *rest)

    def synced_now(file: int) -> None:
        calls.append(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "setxattr", marked)
    monkeypatch.setattr(os, "fsync", synced_now)
    disk.write(b"1", 20 * BLOCK)
    calls.clear()
    assert synced(disk, copy).kind is INCREMENTAL
    assert calls[calls.index("mark") + 1] == copy.stat().st_ino


def test_a_file_that_takes_no_mark_is_compared_after_an_interrupted_sync(
    disk: BackedUpDisk, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmdbitmap.syncs.target.put_new_mark", lambda fd: None)
    disk.write(b"1", 20 * BLOCK)
    killed_after(0, disk, copy)
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (COMPARE, "interrupted")
    assert result.reason is not None
    assert "could not mark the target" in result.reason.words
    disk.write(b"1", 30 * BLOCK)
    assert synced(disk, copy).kind is INCREMENTAL


# --- a copy that something is restored onto ---


def test_what_is_restored_onto_a_copy_after_a_sync_that_was_killed_is_not_taken_for_its_work(
    disk: BackedUpDisk, copy: Path
) -> None:
    disk.backup()
    disk.write(b"2", 20 * BLOCK)
    synced(disk, copy)
    disk.write(b"3", 30 * BLOCK)
    killed_after(0, disk, copy)
    restore(disk.folder / "backups", NAME, copy, in_place=True, store=disk.store)
    assert copy.read_bytes()[20 * BLOCK : 21 * BLOCK] == bytes(BLOCK)
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (COMPARE, "first-sync")
    disk.write(b"4", 40 * BLOCK)
    assert synced(disk, copy).kind is INCREMENTAL


def test_a_diff_that_is_applied_to_a_copy_after_a_sync_that_was_killed_is_not_taken_for_its_work(
    disk: BackedUpDisk, copy: Path
) -> None:
    disk.write(b"3", 30 * BLOCK)
    killed_after(0, disk, copy)
    head = Encoder(Head(1, SIZE, "yesterday", "today"))
    diff = b"".join([head.head(), *head.data(40 * BLOCK, b"not the disk's"), head.end()])
    apply_stream(io.BytesIO(diff), copy, store=disk.store)
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (COMPARE, "first-sync")


def test_a_copy_that_had_another_device_number_when_something_was_restored_onto_it_is_compared(
    disk: BackedUpDisk, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is plugged in anew. When a sync comes, it may have its old number back."""
    disk.backup()
    disk.write(b"3", 30 * BLOCK)
    killed_after(0, disk, copy)
    usual = FileDevice.identity

    def renumbered(device: FileDevice) -> ImageIdentity:
        identity = usual(device)
        return identity._replace(device=identity.device + 1)

    with monkeypatch.context() as patched:
        patched.setattr(FileDevice, "identity", renumbered)
        restore(disk.folder / "backups", NAME, copy, in_place=True, store=disk.store)
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (COMPARE, "first-sync")


@pytest.mark.parametrize("how", ["add", "relocate"])
def test_a_copy_that_was_a_disk_meanwhile_is_compared(disk: BackedUpDisk, copy: Path, how: str) -> None:
    """It took the disk's place after a sync that was killed, and a guest wrote to it."""
    disk.write(b"3", 30 * BLOCK)
    killed_after(0, disk, copy)
    if how == "add":
        session.add(disk.store, "standby", str(copy), granularity_bits=12)
    else:
        session.add(
            disk.store, "standby", str(make_raw_image(disk.folder / "no.raw", SIZE)), granularity_bits=12
        )
        session.relocate(disk.store, "standby", str(copy))
    with Filter.attach(disk.store, "standby", background=False) as standby:
        standby.pwrite(b"a guest's", 40 * BLOCK)
    session.remove(disk.store, "standby")
    result = synced(disk, copy)
    assert (result.kind, reason(result)) == (COMPARE, "first-sync")


def test_a_restore_does_not_follow_the_names_of_copies(
    disk: BackedUpDisk, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may lead to a file server that does not answer."""
    disk.backup()
    stat = os.stat

    def hanging(path: Any, **options: Any) -> os.stat_result:
        assert not str(path).endswith(copy.name)
        return stat(path, **options)

    other = shutil.copy(copy, disk.folder / "other.raw")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", hanging)
        restore(disk.folder / "backups", NAME, other, in_place=True, store=disk.store)
    assert synced(disk, copy).kind is INCREMENTAL


def test_nothing_is_restored_onto_a_copy_while_a_sync_writes_it(disk: BackedUpDisk, far: FarServer) -> None:
    disk.resize(51 * BLOCK)
    disk.backup()

    def meanwhile() -> AbstractContextManager[None]:
        with pytest.raises(Busy, match="in use"):
            restore(disk.folder / "backups", NAME, far.uri, in_place=True, store=disk.store)
        return contextlib.nullcontext()

    synced(disk, far.uri)
    sync(disk.store, NAME, far.uri, quiesced=meanwhile)


def test_nothing_is_restored_onto_an_export_while_a_sync_compares_it(
    disk: BackedUpDisk, far: FarServer
) -> None:
    """Its note has no checkpoint to count from then."""
    disk.resize(51 * BLOCK)
    disk.backup()
    refusals: list[BaseException] = []

    def meanwhile(*_: int) -> None:
        with pytest.raises(Busy, match="in use") as refused:
            restore(disk.folder / "backups", NAME, far.uri, in_place=True, store=disk.store)
        refusals.append(refused.value)

    sync(disk.store, NAME, far.uri, progress=meanwhile)
    assert refusals


def test_a_first_sync_that_failed_goes_on_where_it_was(disk: BackedUpDisk) -> None:
    copy = disk.folder / "copy.raw"
    disk.write(b"2", 20 * BLOCK)
    with pytest.raises(StorageError):
        sync(disk.store, NAME, copy, open_device=failing_after(10))
    disk.write(b"3", 30 * BLOCK)
    result = synced(disk, copy)
    assert (result.kind, reason(result), result.bytes_written) == (COMPARE, "interrupted", 2 * BLOCK)


def test_a_comparison_that_failed_is_followed_by_another(disk: BackedUpDisk, copy: Path) -> None:
    """What somebody else wrote is still there, and nobody can tell any more by the target's mtime."""
    disk.write(b"x", 20 * BLOCK)
    write_as_a_stranger(copy, b"!", 30 * BLOCK)
    with pytest.raises(StorageError):
        sync(disk.store, NAME, copy, open_device=failing_after(1))
    assert reason(synced(disk, copy)) in ("interrupted", "target-changed")


def test_a_copy_that_vanishes_meanwhile_is_an_error(disk: BackedUpDisk, copy: Path) -> None:
    def progress(done: int, total: int) -> None:
        copy.unlink()

    disk.write(b"x", 0)
    with pytest.raises(NotFound, match="was removed or replaced while it was written; sync again"):
        sync(disk.store, NAME, copy, progress=progress)
    assert reason(synced(disk, copy)) == "target-gone"


def test_a_disk_that_is_written_around_its_locks_is_no_point_in_time(disk: BackedUpDisk, copy: Path) -> None:
    def progress(done: int, total: int) -> None:
        disk.write_behind_our_back(b"!", 30 * BLOCK, shift_ns=LATER_NS)

    disk.write(b"x", 0)
    with pytest.raises(Busy, match="was written by another program"):
        sync(disk.store, NAME, copy, progress=progress)
    assert reason(synced(disk, copy)) == "new-epoch"


# --- far targets ---


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarServer]:
    server = FarServer(tmp_path / "far", 51 * BLOCK)
    yield server
    server.close()


def test_an_export_of_another_size_is_refused(disk: BackedUpDisk, far: FarServer) -> None:
    refused(disk, far.uri, InvalidArgument, f"has {51 * BLOCK} bytes, and the disk has {SIZE}; give it")


def test_an_export_becomes_a_copy_and_follows(disk: BackedUpDisk, far: FarServer) -> None:
    disk.resize(51 * BLOCK - 100)
    far.data[:] = no_ascii(51 * BLOCK)
    result = synced(disk, far.uri)
    assert (result.kind, reason(result)) == (COMPARE, "first-sync")
    assert far.stable == disk.content() + bytes(100), "rounded up to a sector, and flushed"
    disk.write(b"x", 0)
    disk.resize(51 * BLOCK - 200)
    result = synced(disk, far.uri)
    assert (result.kind, result.bytes_compared) == (INCREMENTAL, 0)
    assert far.stable == disk.content() + bytes(200)


def test_an_export_that_something_was_restored_onto_is_compared(disk: BackedUpDisk, far: FarServer) -> None:
    disk.resize(51 * BLOCK)
    disk.backup()
    disk.write(b"2", 20 * BLOCK)
    synced(disk, far.uri)
    restore(disk.folder / "backups", NAME, far.uri, in_place=True, store=disk.store)
    assert far.stable != disk.content()
    result = synced(disk, far.uri)
    assert (result.kind, reason(result)) == (COMPARE, "first-sync")
    assert far.stable == disk.content()


def test_what_was_in_a_servers_memory_alone_is_not_found_right_and_then_lost(
    disk: BackedUpDisk, far: FarServer
) -> None:
    far.size = SIZE
    far.data[:] = disk.content()
    far.stable[:] = no_ascii(SIZE)
    far.data[BLOCK] ^= 1
    far.behave = crashing_at_first(WRITE)
    assert synced(disk, far.uri).kind is COMPARE
    assert far.handshakes == 2
    assert far.stable == disk.content()


# --- larger than the disk ---


def synced_onto_larger(disk: BackedUpDisk, far: FarServer) -> SyncResult:
    result = sync(disk.store, NAME, far.uri, larger=True)
    size = len(disk.content())
    assert far.stable == disk.content() + bytes(far.size - size)
    return result


def test_a_larger_export_may_be_asked_for_and_stays_zero_behind_the_disk(
    disk: BackedUpDisk, far: FarServer
) -> None:
    far.size = 80 * BLOCK
    far.data[:] = no_ascii(far.size)
    behind = far.size - SIZE
    refused(disk, far.uri, InvalidArgument, f"or say --larger, which zeroes the {behind} bytes behind")
    assert synced_onto_larger(disk, far).kind is COMPARE
    for size in (SIZE + 20 * BLOCK, SIZE - 10, 3 * BLOCK, 5 * BLOCK, SIZE):
        disk.resize(size)
        disk.write(b"tail", size - 4)
        assert synced_onto_larger(disk, far).kind is INCREMENTAL
    disk.resize(3 * BLOCK)
    assert synced_onto_larger(disk, far).kind is INCREMENTAL


def test_what_is_known_to_be_zero_behind_the_disk_is_not_read_again(
    disk: BackedUpDisk, far: FarServer
) -> None:
    far.size = 80 * BLOCK
    far.data[:] = no_ascii(far.size)
    synced_onto_larger(disk, far)
    disk.write(b"x", 0)
    far.asked.clear()
    synced_onto_larger(disk, far)
    assert far.asked
    assert all(asked.offset < SIZE // 512 * 512 + 512 for asked in far.asked)


def test_an_export_that_grew_since_is_looked_at_behind_the_disk(disk: BackedUpDisk, far: FarServer) -> None:
    far.size = 60 * BLOCK
    far.data[:] = no_ascii(far.size)
    synced_onto_larger(disk, far)
    far.size = 80 * BLOCK
    far.data[:] = far.data[: 60 * BLOCK] + b"o" * (20 * BLOCK)
    assert synced_onto_larger(disk, far).kind is INCREMENTAL


def test_what_a_sync_that_failed_wrote_behind_the_disk_is_zeroed(disk: BackedUpDisk, far: FarServer) -> None:
    far.size = 80 * BLOCK
    far.data[:] = bytes(far.size)
    synced_onto_larger(disk, far)
    disk.resize(70 * BLOCK)
    disk.write(no_ascii(4 * BLOCK), 64 * BLOCK)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sync(disk.store, NAME, far.uri, larger=True, progress=fail)
    assert any(far.data[SIZE:])
    disk.resize(SIZE)
    assert synced_onto_larger(disk, far).kind is INCREMENTAL


def test_a_larger_file_that_nobody_synced_to_keeps_its_size_while_that_is_asked_for(
    disk: BackedUpDisk, tmp_path: Path
) -> None:
    path = tmp_path / "copy.raw"
    path.write_bytes(b"o" * (80 * BLOCK))
    refused(disk, path, InvalidArgument, "name a new file, or one of that size, or say --larger")
    for size in (SIZE, 3 * BLOCK):
        disk.resize(size)
        sync(disk.store, NAME, path, larger=True)
        assert path.read_bytes() == disk.content() + bytes(80 * BLOCK - size)
    assert synced(disk, path).kind is INCREMENTAL  # which cuts it


# --- block devices ---


@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
def test_a_block_device_becomes_a_copy_and_is_believed_until_somebody_writes_it(tmp_path: Path) -> None:
    disk = BackedUpDisk(tmp_path, 1 << 20)
    disk.write(no_ascii(10 * BLOCK), BLOCK)
    with loop_node(tmp_path, 1 << 20) as node:
        node.write_bytes(b"old" * 1000)
        assert reason(synced(disk, node)) == "first-sync"
        disk.write(b"x", 0)
        result = synced(disk, node)
        assert (result.kind, result.bytes_changed) == (INCREMENTAL, BLOCK)
        write_as_a_stranger(node, b"!", 30 * BLOCK)
        result = synced(disk, node)
        assert (result.kind, reason(result), result.bytes_changed) == (COMPARE, "target-changed", BLOCK)
        assert result.reason is not None
        assert result.reason.words.startswith("4096 bytes of the target were written by somebody else")
        disk.resize(2 << 20)
        refused(disk, node, InvalidArgument, "has 1048576 bytes, and the disk has 2097152; give it that size")
        disk.resize(1 << 20)
        assert synced(disk, node).kind is INCREMENTAL
        disk.resize(100 * BLOCK)
        result = sync(disk.store, NAME, node, larger=True)
        assert (result.kind, result.bytes_compared) == (INCREMENTAL, 0)
        assert node.read_bytes() == disk.content() + bytes((1 << 20) - 100 * BLOCK)
    disk.close()


BOOT = DeviceTrace("this boot", disk_sequence=5, sectors_written=100, label="loop")
DEVICE = ImageIdentity(device=7, inode=0, size=SIZE, mtime_ns=0, trace=BOOT)
FILE = ImageIdentity(device=7, inode=9, size=SIZE, mtime_ns=100)


@pytest.mark.parametrize(
    ("before", "now", "gap", "gap_under_way"),
    [
        (FILE, FILE, None, None),
        (FILE, FILE._replace(mtime_ns=101), "written by somebody else", None),
        (FILE, FILE._replace(mtime_ns=99), "written by somebody else", "went back"),
        (FILE, FILE._replace(size=SIZE + 1), "written by somebody else", None),
        (FILE, FILE._replace(inode=10), "another file", "another file"),
        (FILE, DEVICE, "another file or device", "another file or device"),
        (DEVICE, DEVICE, None, None),
        (DEVICE, DEVICE._replace(trace=BOOT._replace(sectors_written=108)), "4096 bytes of the target", None),
        (DEVICE, DEVICE._replace(trace=BOOT._replace(boot_id="next")), "was started", "was started"),
        (DEVICE, DEVICE._replace(trace=BOOT._replace(disk_sequence=6)), "another device", "another device"),
        (DEVICE, DEVICE._replace(trace=BOOT._replace(label="sdb")), "another device", "another device"),
        (DEVICE, DEVICE._replace(trace=None), "does not tell", "does not tell"),
        (DEVICE, DEVICE._replace(size=SIZE + 1), "the target had", None),
        (None, FILE, "nothing was noted", "nothing was noted"),
    ],
)
def test_what_is_believed_of_a_target(
    before: ImageIdentity | None, now: ImageIdentity, gap: str | None, gap_under_way: str | None
) -> None:
    """Under way, the writes since were ours: it has to be the same file or device, and no older."""
    for under_way, expected in ((False, gap), (True, gap_under_way)):
        found = gap_between(before, now, under_way=under_way)
        assert (found is None) if expected is None else (found is not None and expected in found)


# --- notes ---


@pytest.mark.parametrize("identity", [None, FILE, DEVICE])
def test_a_note_is_read_as_it_was_written(identity: ImageIdentity | None) -> None:
    at = sync_note.At(uuid4(), "sync-1", uuid4(), identity)
    for note in (
        sync_note.Note("/a"),
        sync_note.Note("/a", at, under_way=True),
        sync_note.Note("/a", at, unneeded=("sync-2",)),
    ):
        assert sync_note.decode(sync_note.encode(note), "note") == note


WHOLE = sync_note.encode(
    sync_note.Note(
        "/a",
        sync_note.At(uuid4(), "sync-1", uuid4(), DEVICE, sync_note.Sizes(SIZE, 1 << 20)),
        unneeded=("sync-2",),
    )
)


@given(st.integers(0, len(WHOLE) - 1), st.binary(max_size=3), st.integers(0, 40))
def test_bytes_that_are_no_note_are_refused_and_nothing_else(at: int, new: bytes, cut: int) -> None:
    with contextlib.suppress(FormatError):
        sync_note.decode(WHOLE[:at] + new + WHOLE[at + cut :], "note")


@pytest.mark.parametrize("text", ["[]", "{}", "nul", '{"format_version": true}', "[" * 100_000, "1" * 9999])
def test_text_that_is_no_note_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="expected the note of a sync"):
        sync_note.decode(text.encode(), "note")


def test_a_disk_that_is_removed_takes_its_notes_along(disk: BackedUpDisk, copy: Path) -> None:
    [note] = (disk.folder / "store/syncs").glob("*.json")
    Path(f"{note}.0123456789abcdef.partial").touch()
    session.remove(disk.store, NAME)
    assert list((disk.folder / "store/syncs").iterdir()) == []


def test_a_name_that_is_no_syncs_is_never_forgotten(disk: BackedUpDisk, copy: Path) -> None:
    with Filter.attach(disk.store, NAME, background=False) as attached:
        attached.checkpoint("mine")
    [(path, note)] = sync_note.notes(disk.store.path)
    Path(path).write_bytes(
        sync_note.encode(sync_note.Note(note.target, note.at, unneeded=("mine", "epoch-1")))
    )
    synced(disk, copy)
    assert "mine" in disk.checkpoints()
