"""Which backup is made and why, what it holds, and what a refused or failed one leaves."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from lmdbitmap.backups import plan as plan_module
from lmdbitmap.backups import preparing as preparing_module
from lmdbitmap.backups.backup import backup
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
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import TrackableDevice
from lmdbitmap.qcow2 import Kind, Qcow2Reader
from lmdbitmap.repository import manifest as manifest_module
from lmdbitmap.repository.manifest import BackupEntry, BackupType
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import DEFERRED
from lmdbitmap.streams.stream import stream_backup
from lmdbitmap.syncs.sync import sync
from lmdbitmap.tracker import session
from lmdbitmap.upkeep.check import check_store
from lmdbitmap.upkeep.findings import Gravity
from lmdbitmap.work import progress
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, RESCAN, BackedUpDisk
from tests.helpers.bad_disk import BAD_DISK, refuse
from tests.helpers.support import make_raw_image, no_ascii
from tests.helpers.tracked import NAME
from tests.unit.test_digest_algorithms import forget_blake3

pytestmark = pytest.mark.in_memory

KIB = 1 << 10
SIZE = 256 * KIB + 3
BLOCK = 4 * KIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(no_ascii(SIZE), 0)
    yield made
    made.close()


def told(entry: BackupEntry) -> tuple[str, str | None]:
    return entry.type_actual.value, None if entry.reason is None else entry.reason.code


# --- which one is made ---


def test_the_first_backup_is_full_and_says_why(disk: BackedUpDisk) -> None:
    entry = disk.backup()
    assert told(entry) == ("full", "no-earlier-backup")
    assert (entry.type_requested, entry.parent, entry.sequence) == (INCREMENTAL, None, 1)
    assert (entry.bytes_changed, entry.disk_size, entry.trust) == (SIZE, SIZE, Trust.EXACT)


def test_an_increment_holds_what_was_written_since_the_backup_before(disk: BackedUpDisk) -> None:
    disk.backup()
    disk.write(b"x", 5 * BLOCK)
    disk.write(b"x", SIZE - 1)
    entry = disk.backup()
    assert told(entry) == ("incremental", None)
    assert (entry.bytes_changed, entry.bytes_zero, entry.parent) == (BLOCK + 3, 0, "1")
    assert disk.restored() == disk.content()


def test_an_increment_without_changes_is_a_restore_point(disk: BackedUpDisk) -> None:
    disk.backup()
    entry = disk.backup()
    assert (told(entry), entry.bytes_changed) == (("incremental", None), 0)
    assert disk.restored() == disk.content()


def test_what_was_zeroed_since_then_is_zeroes_and_no_data(disk: BackedUpDisk) -> None:
    disk.backup()
    disk.zero(8 * BLOCK, 16 * BLOCK)
    entry = disk.backup()
    assert (entry.bytes_changed, entry.bytes_zero) == (16 * BLOCK, 16 * BLOCK)
    assert disk.restored() == disk.content()


def test_a_differential_backup_counts_from_the_last_full_one(disk: BackedUpDisk) -> None:
    disk.backup()
    disk.write(b"x", 0)
    disk.backup()
    disk.write(b"x", 2 * BLOCK)
    entry = disk.backup(DIFFERENTIAL)
    assert (told(entry), entry.parent, entry.bytes_changed) == (("differential", None), "1", 2 * BLOCK)
    disk.write(b"x", 4 * BLOCK)
    entry = disk.backup()
    assert (told(entry), entry.parent, entry.bytes_changed) == (("incremental", None), "3", BLOCK)
    assert disk.restored() == disk.content()


def test_a_full_backup_that_was_asked_for_needs_no_reason(disk: BackedUpDisk) -> None:
    disk.backup()
    entry = disk.backup(FULL)
    assert (told(entry), entry.parent, entry.bytes_changed) == (("full", None), None, SIZE)
    disk.write(b"x", 0)
    assert disk.backup(DIFFERENTIAL).parent == "2"


@pytest.mark.parametrize(("kind", "becomes"), [(INCREMENTAL, "rescan"), (DIFFERENTIAL, "full")])
def test_in_a_new_epoch_it_is_another_and_the_reason_is_told(
    disk: BackedUpDisk, kind: BackupType, becomes: str
) -> None:
    disk.backup()
    disk.write_behind_our_back(b"stranger", 100)
    entry = disk.backup(kind)
    assert told(entry) == (becomes, "new-epoch")
    assert entry.reason is not None
    assert entry.reason.words == "the image was written while it was not tracked"
    assert disk.restored() == disk.content()
    assert told(disk.backup()) == ("incremental", None)


def test_a_forgotten_checkpoint_makes_it_a_rescan(disk: BackedUpDisk) -> None:
    disk.backup()
    with disk.attach() as attached:
        attached.forget(disk.backup_checkpoints()[0])
    entry = disk.backup()
    assert told(entry) == ("rescan", "checkpoint-forgotten")
    assert told(disk.backup()) == ("incremental", None)


@pytest.mark.parametrize(("damage", "code"), [("gone", "image-missing"), ("cut", "image-changed")])
def test_an_image_of_the_chain_that_is_gone_or_cut_makes_it_full(
    disk: BackedUpDisk, damage: str, code: str
) -> None:
    full = Path(disk.backup_folder().path_of(disk.backup().file))
    disk.backup()
    if damage == "gone":
        full.unlink()
    else:
        os.truncate(full, full.stat().st_size - 1)
    entry = disk.backup()
    assert told(entry) == ("full", code)
    assert disk.restored() == disk.content()
    assert told(disk.backup()) == ("incremental", None)


@BAD_DISK
def test_an_image_that_the_disk_cannot_even_find_makes_it_full(
    disk: BackedUpDisk, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no night would have a backup until somebody asks for a full one."""
    full = disk.backup_folder().path_of(disk.backup().file)
    disk.backup()
    refuse(monkeypatch, full, error)
    assert told(disk.backup()) == ("full", "image-damaged")
    assert disk.restored() == disk.content()
    assert told(disk.backup()) == ("incremental", None)


def test_an_image_that_may_not_be_looked_at_says_nothing_against_it(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, disk.backup_folder().path_of(disk.backup().file), errno.ESTALE)
    with pytest.raises(StorageError, match=r"000001-full\.qcow2: Stale file handle"):
        disk.backup()


@pytest.fixture
def rotten(disk: BackedUpDisk) -> BackedUpDisk:
    """Its last backup has data that cannot be decompressed, and nobody knows what changed since."""
    disk.write(b"much the same" * 5000, 0)
    image = Path(disk.backup_folder().path_of(disk.backup(compression="zlib").file))
    with FileDevice.open(image, read_only=True) as device:
        runs = list(Qcow2Reader(device).extents(0, device.size))
    packed = [run for run in runs if run.kind is Kind.COMPRESSED][-1]
    with image.open("r+b") as file:
        file.seek(packed.host_offset)
        file.write(b"\xff" * 64)
    disk.write_behind_our_back(b"stranger", 200 * KIB)
    return disk


@pytest.mark.parametrize("kind", [INCREMENTAL, RESCAN])
def test_a_rescan_that_cannot_read_the_last_backup_becomes_a_full_one(
    rotten: BackedUpDisk, kind: BackupType
) -> None:
    entry = rotten.backup(kind)
    assert (told(entry), entry.bytes_changed, entry.parent) == (("full", "image-damaged"), SIZE, None)
    assert entry.reason is not None
    assert ": expected BLAKE3 " in entry.reason.words
    assert rotten.restored() == rotten.content()
    assert rotten.files() == ["000001-full.qcow2", "000002-full.qcow2"]
    rotten.write(b"x", 0)
    assert told(rotten.backup()) == ("incremental", None)


def test_a_full_backup_in_place_of_a_rescan_tells_how_far_it_is(
    rotten: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so can be cancelled, though the rescan told as much already."""
    monkeypatch.setattr(progress, "_BYTES_BETWEEN_REPORTS", BLOCK)
    told_of: list[tuple[int, int]] = []
    backup(rotten.store, [NAME], rotten.folder / "backups", progress=lambda *news: told_of.append(news))
    done = [number for number, _ in told_of]
    assert done == sorted(done)
    assert told_of[-1] == (2 * SIZE, 2 * SIZE)


def test_a_rescan_that_is_required_and_cannot_be_is_refused(rotten: BackedUpDisk) -> None:
    before = rotten.backup_checkpoints(), rotten.files()
    with pytest.raises(Untrusted, match=r"cannot have a rescan backup: .*: expected BLAKE3 "):
        backup(rotten.store, [NAME], rotten.folder / "backups", kind=RESCAN, only_that=True)
    assert (rotten.backup_checkpoints(), rotten.files()) == before


def test_of_a_disk_that_is_attached_it_becomes_a_full_one_of_the_same_moment(rotten: BackedUpDisk) -> None:
    with rotten.attach() as attached:
        before = rotten.content()

        @contextmanager
        def moment() -> Iterator[None]:
            yield
            attached.pwrite(b"later" * BLOCK, 0)

        [result] = backup(
            rotten.store, [NAME], rotten.folder / "backups", attached={NAME: attached}, quiesced=moment
        )
    assert told(result.entry) == ("full", "image-damaged")
    assert rotten.restored() == before != rotten.content()


def test_on_a_damaged_chain_no_increment_is_required(unchanged: BackedUpDisk) -> None:
    image = Path(unchanged.backup_folder().path_of(unchanged.manifest().backups[0].file))
    content = image.read_bytes()
    image.write_bytes(b"rot" + content[3:])
    with pytest.raises(Untrusted, match=r"cannot have an incremental backup: .*header magic"):
        backup(unchanged.store, [NAME], unchanged.folder / "backups", only_that=True)


def test_after_a_crash_of_its_owner_an_increment_is_a_superset(disk: BackedUpDisk) -> None:
    disk.backup()
    attached = disk.attach()
    attached.pwrite(b"x", 70 * KIB)
    attached.abandon()
    entry = disk.backup()
    assert (told(entry), entry.trust) == (("incremental", None), Trust.SUPERSET)
    assert disk.restored() == disk.content()
    disk.write(b"y", 0)
    assert disk.backup().trust is Trust.EXACT


# --- sizes ---


def test_a_shrink_and_a_growth_bring_no_old_data_back(disk: BackedUpDisk) -> None:
    disk.backup()
    disk.resize(100 * KIB + 1)
    disk.resize(SIZE + 90 * KIB)
    entry = disk.backup()
    assert (told(entry), entry.disk_size) == (("incremental", None), SIZE + 90 * KIB)
    assert disk.restored() == disk.content()
    assert not any(disk.content()[100 * KIB + 1 :])


def test_every_size_in_between_is_restored_to_the_byte(disk: BackedUpDisk) -> None:
    contents = []
    for size in (SIZE, 100 * KIB + 1, 100 * KIB + 700, 0, 1, 300 * KIB):
        disk.resize(size)
        disk.write(b"z" * min(size, 10), max(size - 10, 0))
        disk.backup()
        contents.append(disk.content())
    assert [disk.restored(str(number)) for number in range(1, 7)] == contents


def test_a_size_that_somebody_else_changed_begins_a_new_epoch(disk: BackedUpDisk) -> None:
    disk.backup()
    os.truncate(disk.image, 50 * KIB)
    entry = disk.backup()
    assert (told(entry), entry.disk_size) == (("rescan", "new-epoch"), 50 * KIB)
    assert disk.restored() == disk.content()


@pytest.mark.parametrize("granularity_bits", [9, 17])
def test_any_granularity_is_restored_right(tmp_path: Path, granularity_bits: int) -> None:
    disk = BackedUpDisk(tmp_path, SIZE, granularity_bits)
    disk.write(no_ascii(SIZE), 0)
    disk.backup()
    disk.write(b"x" * 600, 1000)
    disk.zero(70 * KIB, 140 * KIB)
    assert told(disk.backup()) == ("incremental", None)
    assert disk.restored() == disk.content()
    assert disk.restored("1") != disk.content()
    disk.close()


# --- checkpoints ---


def test_refused_first_backups_leave_nothing_in_the_store(disk: BackedUpDisk) -> None:
    for _ in range(3):
        with pytest.raises(Untrusted, match="no earlier backup"):
            backup(disk.store, [NAME], disk.folder / "backups", only_that=True)
    assert os.listdir(f"{disk.store.path}/holds") == []


def test_a_repository_holds_the_newest_backups_checkpoint_and_the_newest_fulls(disk: BackedUpDisk) -> None:
    held = []
    for kind in (FULL, INCREMENTAL, INCREMENTAL, DIFFERENTIAL, FULL, INCREMENTAL):
        disk.backup(kind)
        entries = disk.manifest().backups
        full = next(entry for entry in reversed(entries) if entry.type_actual is FULL)
        assert disk.backup_checkpoints() == list(
            dict.fromkeys([full.checkpoint.name, entries[-1].checkpoint.name])
        )
        held.append(len(disk.backup_checkpoints()))
    assert held == [1, 2, 2, 2, 1, 2]


def test_checkpoints_of_others_stay(disk: BackedUpDisk) -> None:
    with disk.attach() as attached:
        attached.checkpoint("monday")
    disk.backup()
    with disk.attach() as attached:
        attached.checkpoint("backup-of-mine")
    disk.write(b"x", 0)
    disk.backup()
    disk.backup(FULL)
    assert disk.checkpoints()[:3] == ["epoch-1", "monday", "backup-of-mine"]
    assert len(disk.checkpoints()) == 4


def test_two_repositories_do_not_disturb_each_other(disk: BackedUpDisk) -> None:
    disk.backup(to="left")
    disk.write(b"1", 0)
    disk.backup(to="right")
    disk.write(b"2", 4 * BLOCK)
    assert disk.backup(to="left").bytes_changed == 2 * BLOCK
    disk.write(b"3", 8 * BLOCK)
    assert disk.backup(to="left").bytes_changed == BLOCK
    entry = disk.backup(to="right")
    assert (told(entry), entry.bytes_changed) == (("incremental", None), 2 * BLOCK)
    assert disk.restored(to="left") == disk.restored(to="right") == disk.content()


def test_an_older_epochs_checkpoints_of_ours_are_let_go(disk: BackedUpDisk) -> None:
    disk.backup()
    disk.backup()
    disk.write_behind_our_back(b"stranger", 0)
    disk.backup()
    assert len(disk.backup_checkpoints()) == 1


# --- several disks ---


@pytest.fixture
def two(disk: BackedUpDisk) -> BackedUpDisk:
    image = make_raw_image(disk.folder / "other.raw", 40 * KIB, [(0, b"other")])
    session.add(disk.store, "sdb", str(image), granularity_bits=12)
    return disk


def test_several_disks_have_one_point_in_time(two: BackedUpDisk) -> None:
    results = backup(two.store, ["sdb", NAME], two.folder / "backups")
    assert [result.disk for result in results] == ["sdb", NAME]
    assert len({(result.entry.checkpoint.name, result.entry.time_ns) for result in results}) == 1
    assert [Path(result.path).relative_to(two.folder) for result in results] == [
        Path("backups/sdb/000001-full.qcow2"),
        Path("backups/sda/000001-full.qcow2"),
    ]


def test_a_disk_named_twice_is_refused(disk: BackedUpDisk) -> None:
    with pytest.raises(InvalidArgument, match="named twice"):
        backup(disk.store, [NAME, NAME], disk.folder / "backups")


# --- refusals: nothing is changed ---


@pytest.fixture
def unchanged(disk: BackedUpDisk) -> Iterator[BackedUpDisk]:
    """A disk with one backup, to which nothing may happen in the test."""
    disk.backup()
    before = disk.checkpoints(), disk.manifest(), disk.files()
    yield disk
    assert (disk.checkpoints(), disk.manifest(), disk.files()) == before


def test_backup_counts_from_no_other_checkpoint_of_the_same_name(disk: BackedUpDisk) -> None:
    """Forgotten and made again between the plan and the moment: since then nothing has changed."""
    counted_from = disk.backup().checkpoint.name
    with disk.attach() as attached:
        attached.pwrite(b"changed", 0)

        @contextmanager
        def replace_checkpoint() -> Iterator[None]:
            attached.forget(counted_from)
            attached.checkpoint(counted_from)
            yield

        with pytest.raises(Busy, match="another has its name"):
            backup(
                disk.store, [NAME], disk.folder / "backups",
                attached={NAME: attached}, quiesced=replace_checkpoint,
            )  # fmt: skip
    assert told(disk.backup()) == ("rescan", "checkpoint-forgotten")
    assert disk.restored() == disk.content()


def test_an_attached_disk_is_busy(unchanged: BackedUpDisk) -> None:
    with unchanged.attach(), pytest.raises(Busy) as refused:
        unchanged.backup()
    assert str(refused.value) == (
        "disk 'sda' is owned by a process that does not serve it, such as another backup; "
        "wait for that process, or stop it"
    )


def test_a_backup_that_is_refused_leaves_no_folder(unchanged: BackedUpDisk) -> None:
    before = unchanged.files()
    with unchanged.attach():
        for repository in ("backups", "elsewhere"):
            with pytest.raises(Busy):
                unchanged.backup(to=repository)
    assert unchanged.files() == before
    assert not (unchanged.folder / "elsewhere").exists()


def test_an_image_that_somebody_has_open_for_writing_is_busy(unchanged: BackedUpDisk) -> None:
    with FileDevice.open(unchanged.image), pytest.raises(Busy, match="is open in QEMU or in another"):
        unchanged.backup()


def test_an_image_that_somebody_reads_is_not_busy(disk: BackedUpDisk) -> None:
    with FileDevice.open(disk.image, read_only=True):
        disk.backup()
    assert len(disk.manifest().backups) == 1


def test_a_second_backup_into_the_folder_is_busy(unchanged: BackedUpDisk) -> None:
    with unchanged.backup_folder().locked(), pytest.raises(Busy):
        unchanged.backup()


def test_another_disks_folder_is_not_continued(disk: BackedUpDisk, tmp_path: Path) -> None:
    disk.backup()
    (tmp_path / "elsewhere").mkdir()
    other = BackedUpDisk(tmp_path / "elsewhere", SIZE)
    manifest = disk.manifest()
    with pytest.raises(AlreadyExists, match="has the backups of another disk that was called 'sda' too"):
        backup(other.store, [NAME], tmp_path / "backups")
    assert disk.manifest() == manifest
    assert other.backup_checkpoints() == []
    other.close()


def test_a_damaged_manifest_stops_the_backup_and_stays(disk: BackedUpDisk) -> None:
    disk.backup()
    path = Path(disk.backup_folder().path_of("manifest.json"))
    path.write_bytes(path.read_bytes()[:-10])
    before, checkpoints = path.read_bytes(), disk.checkpoints()
    with pytest.raises(
        FormatError, match=r"bring it back with `cp .*manifest\.json\.copy .*, up to backup 1 of"
    ):
        disk.backup()
    assert (path.read_bytes(), disk.checkpoints()) == (before, checkpoints)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "missing", "folder", "link"])
def test_a_full_backup_begins_a_new_chain_where_the_manifest_cannot_be_read(
    disk: BackedUpDisk, damage: str
) -> None:
    """Nothing of what was there is lost: neither the images nor what stood in the manifest's place."""
    disk.write(b"old", 0)
    disk.backup()
    disk.backup()
    path = Path(disk.backup_folder().path_of("manifest.json"))
    images = {name: (path.parent / name).read_bytes() for name in disk.files()}
    spoil(path, damage)
    disk.write(b"new", 4096)
    with pytest.raises(FormatError, match="begin a new chain with `backup --full`"):
        disk.backup()
    full = disk.backup(FULL)
    assert (full.sequence, full.reason and full.reason.code) == (3, "manifest-unreadable")
    assert {name: (path.parent / name).read_bytes() for name in images} == images
    aside = list(path.parent.glob("manifest.json.damaged-*"))
    assert len(aside) == (damage != "missing")
    assert disk.restored() == disk.content()
    disk.write(b"newer", 8192)
    assert disk.backup().type_actual is INCREMENTAL
    assert disk.restored() == disk.content()


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_new_chain_that_is_cancelled_leaves_no_checkpoint_behind(disk: BackedUpDisk, damage: str) -> None:
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    disk.backup()
    disk.backup()
    before = disk.backup_checkpoints()
    spoil(Path(disk.backup_folder().path_of("manifest.json")), damage)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            backup(disk.store, [NAME], disk.folder / "backups", kind=FULL, progress=cancel)
        assert disk.backup_checkpoints() == before
    assert not os.path.lexists(disk.backup_folder().path_of("unfinished"))
    entry = disk.backup(FULL)
    assert disk.backup_checkpoints() == [*before, entry.checkpoint.name]


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "link":
        path.symlink_to("nowhere")
    elif damage != "missing":
        path.write_bytes({"cut": content[:-40], "garbage": b"\xff" * 99, "empty": b""}[damage])


def test_a_manifest_of_a_newer_version_is_never_replaced(disk: BackedUpDisk) -> None:
    disk.backup()
    path = Path(disk.backup_folder().path_of("manifest.json"))
    newer = path.read_bytes().replace(b'"format_version": 3', b'"format_version": 4')
    path.write_bytes(newer)
    with pytest.raises(FormatError, match="use a newer lmdbitmap, or another repository"):
        disk.backup(FULL)
    assert path.read_bytes() == newer


def test_a_full_backup_makes_damaged_records_whole(disk: BackedUpDisk) -> None:
    disk.clean("start")
    disk.write(b"old", 0)
    with disk.store.read() as reader:
        bitmap_id = reader.checkpoints(disk.disk().uuid)[-1].bitmap_id
    key = schema.region_key(bitmap_id, 0)
    disk.store.update(lambda writer: writer._put("regions", key, b"rotten"))
    assert [finding.gravity for finding in check_store(disk.store)] == [Gravity.DAMAGE]
    disk.backup(FULL)
    assert check_store(disk.store) == []
    with disk.store.read() as reader:
        assert reader.bitmap(bitmap_id).all_dirty == "some of its records were damaged"


def test_a_manifest_without_room_for_one_more_is_told_before_anything_is_copied(
    unchanged: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(unchanged.backup_folder().path_of("manifest.json"))
    with monkeypatch.context() as patched:
        most = path.stat().st_size + manifest_module.MOST_ENTRY_BYTES
        patched.setattr(manifest_module, "MAX_MANIFEST_BYTES", most - 1)
        for kind in (INCREMENTAL, FULL):
            with pytest.raises(StorageError) as refused:
                back_up_with(fail_to_read, unchanged, kind)
            assert str(refused.value) == (
                f"{path}: 1 backups leave no room for one more;"
                " merge old ones with `lmdbitmap prune`, or use another repository"
            )
        patched.setattr(manifest_module, "MAX_MANIFEST_BYTES", most)
        with pytest.raises(StorageError, match="Input/output error"):
            back_up_with(fail_to_read, unchanged)


def test_an_unknown_disk_makes_no_folder(disk: BackedUpDisk) -> None:
    with pytest.raises(NotFound, match="no disk is called 'sdx'"):
        backup(disk.store, ["sdx"], disk.folder / "backups")
    assert not (disk.folder / "backups").exists()


# --- failures on the way ---


class TroubledDevice(FileDevice):
    """Something happens whenever it is read."""

    trouble: Callable[[], None]

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.trouble()
        super().pread_into(buffer, offset)


def back_up_with(trouble: Callable[[], None], disk: BackedUpDisk, kind: BackupType = FULL) -> None:
    def opened(image: str) -> TrackableDevice:
        device = cast(TroubledDevice, TroubledDevice.open(image, read_only=True))
        device.trouble = trouble
        return device

    backup(disk.store, [NAME], disk.folder / "backups", kind=kind, open_device=opened)


def fail_to_read() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_image_that_cannot_be_read_fails_in_our_words(unchanged: BackedUpDisk) -> None:
    with pytest.raises(StorageError) as refused:
        back_up_with(fail_to_read, unchanged)
    assert refused.value.place == str(unchanged.image)


def test_an_image_that_is_cut_meanwhile_fails_in_our_words(disk: BackedUpDisk) -> None:
    with pytest.raises(
        StorageError, match=r"the image ends at byte .*: it was cut while it was open; mend the cause"
    ):
        back_up_with(partial(os.truncate, disk.image, 10), disk)
    assert (disk.files(), disk.backup_checkpoints()) == ([], [])


def test_an_image_that_somebody_writes_meanwhile_is_no_backup(disk: BackedUpDisk) -> None:
    with pytest.raises(Busy, match="was written by another program while it was backed up"):
        back_up_with(partial(disk.write_behind_our_back, b"stranger", 0), disk)
    assert (disk.files(), disk.backup_checkpoints()) == ([], [])
    assert told(disk.backup()) == ("full", "no-earlier-backup")


def test_an_interrupted_backup_leaves_nothing_and_the_next_is_incremental(disk: BackedUpDisk) -> None:
    disk.backup()
    before = disk.checkpoints(), disk.manifest(), disk.files()
    disk.write(b"x", 0)
    with pytest.raises(KeyboardInterrupt):
        back_up_with(interrupt, disk)
    assert (disk.checkpoints(), disk.manifest(), disk.files()) == before
    disk.write(b"y", 8 * BLOCK)
    entry = disk.backup()
    assert (told(entry), entry.bytes_changed) == (("incremental", None), 2 * BLOCK)
    assert disk.restored() == disk.content()


def test_a_listener_that_raises_cancels_the_backup(unchanged: BackedUpDisk) -> None:
    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        backup(unchanged.store, [NAME], unchanged.folder / "backups", kind=FULL, progress=cancel)


@pytest.mark.parametrize(
    "theirs", [FileNotFoundError(2, "no log"), BlockingIOError(11, "slow reader"), TimeoutError()]
)
@pytest.mark.parametrize("kind", [FULL, RESCAN])
def test_what_a_listener_raises_is_no_refusal_of_the_disk(
    unchanged: BackedUpDisk, kind: BackupType, theirs: OSError
) -> None:
    """Its image is there, and nobody has it."""

    def cancel(done: int, total: int) -> None:
        raise theirs

    with pytest.raises(type(theirs)) as raised:
        backup(unchanged.store, [NAME], unchanged.folder / "backups", kind=kind, progress=cancel)
    assert raised.value is theirs
    with pytest.raises(type(theirs)) as raised:
        stream_backup(unchanged.store, NAME, io.BytesIO(), progress=cancel)
    assert raised.value is theirs
    with pytest.raises(type(theirs)) as raised:
        sync(unchanged.store, NAME, unchanged.folder / "copy", progress=cancel)
    assert raised.value is theirs


def test_progress_ends_at_the_total_of_all_disks(two: BackedUpDisk) -> None:
    said: list[tuple[int, int]] = []
    backup(two.store, [NAME, "sdb"], two.folder / "backups", progress=lambda *told: said.append(told))
    assert said[-1] == (SIZE + 40 * KIB, SIZE + 40 * KIB)


@pytest.mark.parametrize("place", ["image", "manifest"])
def test_a_failure_to_write_the_archive_leaves_nothing(
    unchanged: BackedUpDisk, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def refuse(source: str, target: str) -> None:
        if target.endswith("manifest.json" if place == "manifest" else ".qcow2"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        unchanged.backup()


def test_an_image_that_cannot_be_synced_is_no_backup(
    unchanged: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sync of a file tells of the failure, and no later one does."""
    sync = os.fsync
    failed: list[int] = []

    def fail_once(fd: int) -> None:
        if not failed and os.readlink(f"/proc/self/fd/{fd}").split("/")[-1].startswith("000002-"):
            failed.append(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(StorageError, match=r"000002-incremental\.qcow2: Input/output error"):
        unchanged.backup()
    assert len(failed) == 1


def test_a_store_that_cannot_forget_does_not_fail_the_backup(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk.backup()
    disk.backup()

    def refuse(*_: object) -> None:
        raise StorageError("store", OSError(errno.ENOSPC, "full"), next_step="free some space")

    with monkeypatch.context() as patched:
        patched.setattr("lmdbitmap.tracker.chain.forget", refuse)
        disk.backup()
    assert "old checkpoints stay until the next backup" in caplog.text
    assert len(disk.backup_checkpoints()) == 3
    disk.backup()
    assert len(disk.backup_checkpoints()) == 2


# --- the disk itself ---


@pytest.mark.parametrize("durability", ["write-ahead", DEFERRED])
def test_no_session_is_open_while_a_backup_copies(tmp_path: Path, durability: str) -> None:
    disk = BackedUpDisk(tmp_path, SIZE, durability=durability)
    disk.write(b"x", 0)
    seen: list[object] = []
    back_up_with(lambda: seen.append(disk.disk().session), disk)
    assert seen == [None]
    disk.close()


def test_the_image_is_flushed_before_its_checkpoint_is_taken(disk: BackedUpDisk) -> None:
    """What a guest wrote and never flushed must not vanish in a power cut after it was backed up as unchanged."""
    seen: list[list[str]] = []

    class FlushedDevice(FileDevice):
        def flush(self) -> None:
            seen.append(disk.backup_checkpoints())
            super().flush()

    backup(
        disk.store, [NAME], disk.folder / "backups", open_device=lambda image: FlushedDevice.open(image, read_only=True)
    )  # fmt: skip
    assert seen == [[]]


def test_images_and_manifest_are_for_their_owners_eyes(disk: BackedUpDisk) -> None:
    disk.backup()
    modes = [entry.stat().st_mode & 0o777 for entry in os.scandir(disk.backup_folder().path)]
    assert (len(modes), set(modes)) == (5, {0o600})


# --- the documentation ---


def test_every_field_and_every_reason_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "backup.md").read_text()
    assert [field.name for field in dataclasses.fields(BackupEntry) if f"`{field.name}`" not in text] == []
    sources = [Path(str(module.__file__)).read_text() for module in (preparing_module, plan_module)]
    codes = re.findall(r'Reason\(\s*"([a-z-]+)"', "".join(sources))
    assert len(codes) == 9
    assert [code for code in codes if f"`{code}`" not in text] == []


# --- what its digests are made with ---


def digests(disk: BackedUpDisk) -> list[str]:
    return [entry.digest_algorithm.value for entry in disk.manifest().backups]


def test_a_chain_goes_on_with_the_digests_of_its_newest_backup(disk: BackedUpDisk) -> None:
    for digest in ("sha256", None, "blake3", None, "sha256", None):
        disk.write(b"x", 0)
        disk.backup(digest=digest)
    assert disk.backup(DIFFERENTIAL).digest_algorithm.value == "sha256"
    assert digests(disk) == ["sha256", "sha256", "blake3", "blake3", "sha256", "sha256", "sha256"]
    assert disk.manifest().format_version == 3
    assert [disk.restored(str(number)) for number in (1, 7)] == [disk.content()] * 2


def test_a_new_chain_begins_with_the_fastest(disk: BackedUpDisk) -> None:
    disk.backup(digest="sha256")
    disk.backup()
    disk.backup(FULL)
    assert digests(disk) == ["sha256", "sha256", "blake3"]


@pytest.mark.parametrize("kind", [INCREMENTAL, DIFFERENTIAL, RESCAN])
def test_a_full_backup_that_nobody_asked_for_changes_no_digests(disk: BackedUpDisk, kind: BackupType) -> None:
    """Or older programs could not read the repository from one night to the next."""
    disk.backup(digest="sha256")
    Path(disk.backup_folder().path_of(disk.manifest().backups[0].file)).unlink()
    entry = disk.backup(kind)
    assert (entry.type_requested, entry.type_actual) == (kind, FULL)
    assert digests(disk) == ["sha256"] * 2
    assert disk.manifest().format_version == 2


def test_a_chain_of_sha256_alone_is_one_that_older_programs_read(disk: BackedUpDisk) -> None:
    disk.backup(digest="sha256")
    disk.backup()
    text = json.loads(Path(disk.backup_folder().path_of("manifest.json")).read_bytes())
    assert text["format_version"] == 2
    assert [set(entry["chunks"]) for entry in text["backups"]] == [{"file", "chunk_size", "sha256"}] * 2


@pytest.mark.parametrize("changed", [True, False])
@pytest.mark.parametrize("digest", ["sha256", "blake3"])
def test_a_rescan_compares_data_whatever_the_digests_are(
    disk: BackedUpDisk, digest: str, changed: bool
) -> None:
    """Digests of two kinds are never compared: both differ for the same data."""
    disk.backup(digest=digest)
    if changed:
        disk.write(b"changed", 9 * BLOCK)
    entry = disk.backup(RESCAN, digest="sha256" if digest == "blake3" else "blake3")
    assert (told(entry), entry.bytes_changed) == (("rescan", None), BLOCK if changed else 0)
    assert disk.restored() == disk.content()


def test_without_its_package_a_chain_goes_on_in_sha256_and_that_is_said(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.backup(digest="blake3")
    forget_blake3(monkeypatch)
    disk.write(b"x", 0)
    [result] = backup(disk.store, [NAME], disk.folder / "backups")
    assert told(result.entry) == ("incremental", None)
    assert result.entry.digest_algorithm.value == "sha256"
    assert result.digest_reason is not None
    assert result.digest_reason.code == "package-missing"
    assert "no package blake3 here, which digests like those of backup 1 need" in result.digest_reason.words
    monkeypatch.undo()
    assert disk.restored() == disk.content()
    [result] = backup(disk.store, [NAME], disk.folder / "backups")
    assert (result.digest_reason, digests(disk)) == (None, ["blake3", "sha256", "sha256"])


def test_a_rescan_needs_no_package_either(disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.backup(digest="blake3")
    disk.write(b"x", 0)
    forget_blake3(monkeypatch)
    entry = disk.backup(RESCAN)
    assert (told(entry), entry.bytes_changed) == (("rescan", None), BLOCK)
    assert digests(disk) == ["blake3", "sha256"]


def test_digests_that_were_asked_for_and_cannot_be_made_are_refused_before_anything_is_done(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidArgument, match="'md5' is no kind of digest; choose sha256 or blake3"):
        disk.backup(digest="md5")
    forget_blake3(monkeypatch)
    with pytest.raises(NotFound, match=r"digest blake3: expected the package blake3.*'lmdbitmap\[fast\]'"):
        disk.backup(digest="blake3")
    assert not (disk.folder / "backups").exists()
    assert disk.backup_checkpoints() == []


def test_arguments_of_the_wrong_kind_are_refused_in_words(disk: BackedUpDisk) -> None:
    with pytest.raises(InvalidArgument, match=r"'sda' is one name where several may be; give \['sda'\]"):
        backup(disk.store, "sda", disk.folder / "backups")
    with pytest.raises(InvalidArgument, match="there is no kind of backup 'weekly'; use one of "):
        backup(disk.store, [NAME], disk.folder / "backups", kind="weekly")  # type: ignore[arg-type]
    with pytest.raises(
        InvalidArgument, match="attached disks are no mapping; give each filter by the name of "
    ):
        backup(disk.store, [NAME], disk.folder / "backups", attached=[])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"'/tmp' is not where to keep old data; give Scratch\(folder"):
        backup(disk.store, [NAME], disk.folder / "backups", scratch="/tmp")  # type: ignore[arg-type]
    assert not (disk.folder / "backups").exists()
    [result] = backup(disk.store, [NAME], disk.folder / "backups", kind="full")  # type: ignore[arg-type]
    assert result.entry.type_requested is BackupType.FULL
