"""Whose a repository is, and whether it is there: what is taken over, and what is new."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from datetime import timezone
from pathlib import Path

import pytest

from lmdbitmap.backups.backup import backup
from lmdbitmap.backups.consumers import drop_hold, holds_of
from lmdbitmap.backups.result import BackupsFailed
from lmdbitmap.errors import AlreadyExists, LmdbitmapError, NotFound, Untrusted
from lmdbitmap.notes.holds import hold_files
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.transfer import copy_backups
from lmdbitmap.tracker import session
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, RESCAN, BackedUpDisk
from tests.helpers.support import make_raw_image, no_ascii, run
from tests.helpers.tracked import NAME

BLOCK = 4096
SIZE = 50 * BLOCK + 7


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    (tmp_path / "here").mkdir()
    made = BackedUpDisk(tmp_path / "here", SIZE)
    made.write(no_ascii(SIZE), 0)
    yield made
    made.close()


def told(entry: BackupEntry) -> tuple[str, str | None]:
    return entry.type_actual.value, None if entry.reason is None else entry.reason.code


def moved(disk: BackedUpDisk, granularity_bits: int = 12) -> BackedUpDisk:
    """The disk on another host, with a store of its own, and the repository that both reach."""
    there = disk.folder.parent / "there"
    there.mkdir()
    other = BackedUpDisk(there, SIZE, granularity_bits)
    other.write(disk.content(), 0)
    (there / "backups").symlink_to(disk.folder / "backups")
    return other


@pytest.fixture
def other(disk: BackedUpDisk) -> Iterator[BackedUpDisk]:
    disk.backup()
    disk.write(b"later", 7 * BLOCK)
    disk.backup()
    made = moved(disk)
    yield made
    made.close()


# --- a disk that was tracked elsewhere ---


def test_a_disk_on_another_host_goes_on_with_its_chain(disk: BackedUpDisk, other: BackedUpDisk) -> None:
    other.write(b"over there", 20 * BLOCK)
    entry = other.backup(take_over=True)
    assert (told(entry), entry.parent, entry.bytes_changed) == (("rescan", "tracked-elsewhere"), "2", BLOCK)
    assert (other.manifest().disk.uuid, other.manifest().disk.name) == (other.disk().uuid, NAME)
    assert [other.restored("2"), other.restored()] == [disk.content(), other.content()]
    other.write(b"and on", 30 * BLOCK)
    entry = other.backup()
    assert (told(entry), entry.bytes_changed) == (("incremental", None), BLOCK)
    assert other.restored() == other.content()
    run("qemu-img", "check", "-q", other.backup_folder().path_of(entry.file))


def test_it_stays_refused_without_the_word_and_the_refusal_names_it(
    disk: BackedUpDisk, other: BackedUpDisk
) -> None:
    note = Path(disk.backup_folder().path_of("unfinished"))
    note.write_text("backup-20200101T000000Z-abcdef 000003-full.qcow2\n")
    before = disk.manifest()
    for kind in (INCREMENTAL, DIFFERENTIAL, FULL, RESCAN):
        with pytest.raises(AlreadyExists, match="say --take-over"):
            other.backup(kind)
    assert (disk.manifest(), note.exists()) == (before, True), "nor was anything undone that is not ours"
    assert (other.backup_checkpoints(), holds_of(other.store, NAME)) == ([], [])


def test_the_disk_that_it_was_taken_from_is_refused_from_then_on(
    disk: BackedUpDisk, other: BackedUpDisk
) -> None:
    other.backup(take_over=True)
    with pytest.raises(AlreadyExists, match="say --take-over"):
        disk.backup()


def test_a_disk_that_was_added_anew_takes_its_own_chain_over(disk: BackedUpDisk) -> None:
    disk.backup()
    session.remove(disk.store, NAME)
    session.add(disk.store, NAME, str(disk.image), granularity_bits=12)
    with pytest.raises(AlreadyExists):
        disk.backup()
    assert told(disk.backup(take_over=True)) == ("rescan", "tracked-elsewhere")
    assert told(disk.backup()) == ("incremental", None)


@pytest.mark.parametrize("granularity_bits", [9, 16])
def test_the_granularity_may_be_another(disk: BackedUpDisk, granularity_bits: int) -> None:
    disk.backup()
    other = moved(disk, granularity_bits)
    other.write(b"x", 3 * BLOCK)
    assert told(other.backup(take_over=True)) == ("rescan", "tracked-elsewhere")
    other.resize(SIZE - 2 * BLOCK)
    assert told(other.backup()) == ("incremental", None)
    assert other.restored() == other.content()
    other.close()


@pytest.mark.parametrize(
    ("kind", "becomes"),
    [
        (DIFFERENTIAL, ("full", "tracked-elsewhere")),
        (RESCAN, ("rescan", None)),
        (FULL, ("full", None)),
    ],
)
def test_of_another_kind_nothing_counts_from_a_checkpoint_either(
    other: BackedUpDisk, kind: object, becomes: tuple[str, str | None]
) -> None:
    other.write(b"x", 3 * BLOCK)
    assert told(other.backup(kind, take_over=True)) == becomes  # type: ignore[arg-type]
    assert other.restored() == other.content()
    assert told(other.backup(DIFFERENTIAL))[0] == ("differential" if becomes[0] == "full" else "full")
    assert other.restored() == other.content()


def test_no_checkpoint_is_believed_be_it_the_very_one(disk: BackedUpDisk, other: BackedUpDisk) -> None:
    """Of a store that was copied, and in which the disk got another uuid: all that the manifest names is there."""
    backups = other.manifest()
    disk.write(b"not seen by anybody's word", 9 * BLOCK)
    stranger = dataclasses.replace(backups.disk, uuid=other.disk().uuid)
    disk.backup_folder().replace_manifest(dataclasses.replace(backups, disk=stranger))
    entry = disk.backup(take_over=True)
    assert (told(entry), entry.bytes_changed) == (("rescan", "tracked-elsewhere"), BLOCK)


def test_a_disk_that_comes_back_counts_from_nothing_that_is_older_than_its_absence(
    disk: BackedUpDisk, other: BackedUpDisk
) -> None:
    """Its store has the checkpoint of the full backup still, in the same epoch; and does not know of that time."""
    other.write(b"over there", 20 * BLOCK)
    other.backup(take_over=True)
    behind = disk.image.stat()
    with disk.image.open("r+b") as image:
        image.seek(20 * BLOCK)
        image.write(b"over there")
    os.utime(disk.image, ns=(behind.st_atime_ns, behind.st_mtime_ns))
    epoch, fulls = disk.disk().epoch, disk.manifest().backups[0].checkpoint.name
    assert fulls in disk.checkpoints()
    assert told(disk.backup(take_over=True)) == ("rescan", "tracked-elsewhere")
    assert fulls not in disk.checkpoints(), "nobody counts from it any more"
    entry = disk.backup(DIFFERENTIAL)
    assert (told(entry), disk.disk().epoch) == (("full", "tracked-elsewhere"), epoch)
    assert disk.restored() == disk.content()
    disk.write(b"x", 0)
    assert told(disk.backup(DIFFERENTIAL)) == ("differential", None)


def test_what_has_to_be_incremental_cannot_take_over(other: BackedUpDisk) -> None:
    before = other.manifest()
    with pytest.raises(Untrusted, match="backup 2, before it, was made while the disk was tracked elsewhere"):
        backup(other.store, [NAME], other.folder / "backups", only_that=True, take_over=True)
    assert (other.manifest(), other.backup_checkpoints()) == (before, [])


def test_a_take_over_that_fails_leaves_the_folder_whose_it_was(
    disk: BackedUpDisk, other: BackedUpDisk
) -> None:
    before = disk.manifest(), disk.files()

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    other.write(b"x", 0)
    with pytest.raises(KeyboardInterrupt):
        backup(other.store, [NAME], other.folder / "backups", take_over=True, progress=cancel)
    assert (disk.manifest(), disk.files()) == before
    disk.write(b"x", 0)
    assert told(disk.backup()) == ("incremental", None)


def test_the_word_changes_nothing_for_a_disk_whose_the_folder_is(disk: BackedUpDisk) -> None:
    disk.backup()
    disk.write(b"x", 0)
    assert told(disk.backup(take_over=True)) == ("incremental", None)


def test_nothing_is_taken_over_where_nothing_is_and_nothing_is_made_there(disk: BackedUpDisk) -> None:
    with pytest.raises(NotFound, match="has no backups to take over; see whether its file system is mounted"):
        disk.backup(take_over=True)
    assert not (disk.folder / "backups").exists()


def test_a_prune_in_between_brings_no_checkpoint_back(disk: BackedUpDisk, other: BackedUpDisk) -> None:
    """The full backup stays, and so does its checkpoint, which somebody else holds; what was made elsewhere goes."""
    copy_backups(disk.folder / "backups", disk.folder / "copy")
    disk.backup(DIFFERENTIAL, to="copy")
    other.write(b"over there", 20 * BLOCK)
    other.backup(take_over=True)
    disk.backup(take_over=True)
    backups = disk.manifest().backups
    day_ns = 86_400 * 10**9
    dated = tuple(
        dataclasses.replace(entry, time_ns=day * day_ns)
        for entry, day in zip(backups, (1, 2, 2, 2), strict=True)
    )
    disk.backup_folder().replace_manifest(dataclasses.replace(disk.manifest(), backups=dated))
    prune(disk.folder / "backups", keep=Retention(daily=2), zone=timezone.utc)
    assert [entry.id for entry in disk.manifest().backups] == ["1", "4"]
    assert backups[0].checkpoint.name in disk.checkpoints()
    assert told(disk.backup(DIFFERENTIAL)) == ("full", "tracked-elsewhere")


# --- a place where nothing is any more ---


def unmount(disk: BackedUpDisk, mount_point_stays: bool = True) -> None:
    shutil.move(disk.folder / "backups", disk.folder / "unmounted")
    if mount_point_stays:
        (disk.folder / "backups").mkdir()


@pytest.mark.parametrize("mount_point_stays", [True, False])
def test_where_the_disk_was_backed_up_to_and_nothing_is_no_repository_begins_by_itself(
    disk: BackedUpDisk, mount_point_stays: bool
) -> None:
    disk.backup()
    unmount(disk, mount_point_stays)
    checkpoints = disk.checkpoints()
    for kind in (INCREMENTAL, FULL):
        with pytest.raises(NotFound, match=r"has no backups, but disk 'sda' was backed up to .* say --new-r"):
            disk.backup(kind)
    assert disk.checkpoints() == checkpoints
    assert (disk.folder / "backups").exists() == mount_point_stays
    assert not (disk.folder / "backups" / NAME).exists()
    shutil.rmtree(disk.folder / "backups", ignore_errors=True)
    shutil.move(disk.folder / "unmounted", disk.folder / "backups")
    assert told(disk.backup()) == ("incremental", None)


@pytest.mark.parametrize("names", [["new"], ["new", NAME]])
@pytest.mark.parametrize("mount_point_stays", [True, False])
def test_no_repository_begins_there_for_a_new_disk(
    disk: BackedUpDisk, mount_point_stays: bool, names: list[str]
) -> None:
    session.add(
        disk.store, "new", str(make_raw_image(disk.folder / "new.raw", 64 << 10)), granularity_bits=12
    )
    disk.backup()
    unmount(disk, mount_point_stays)
    repository = disk.folder / "backups"
    with pytest.raises(
        LmdbitmapError, match=r"new has no backups, but disk 'sda' was backed up to "
    ) as failed:
        backup(disk.store, names, repository)
    assert not isinstance(failed.value, BackupsFailed) or set(failed.value.failures) == set(names)
    assert repository.exists() == mount_point_stays
    assert not mount_point_stays or os.listdir(repository) == []
    shutil.rmtree(repository, ignore_errors=True)
    shutil.move(disk.folder / "unmounted", repository)
    assert len(backup(disk.store, names, repository)) == len(names)


def test_another_repository_begins_there_when_that_is_asked_for(disk: BackedUpDisk) -> None:
    disk.backup()
    unmount(disk)
    assert told(disk.backup(new_repository=True)) == ("full", "no-earlier-backup")
    assert told(disk.backup()) == ("incremental", None)
    assert len(holds_of(disk.store, NAME)) == 2


def test_a_place_of_which_nothing_is_known_may_be_new(disk: BackedUpDisk) -> None:
    disk.backup()
    assert told(disk.backup(to="another")) == ("full", "no-earlier-backup")
    assert len(holds_of(disk.store, NAME)) == 2


def test_a_repository_that_was_given_up_by_hand_is_not_missed(disk: BackedUpDisk) -> None:
    disk.backup()
    unmount(disk)
    drop_hold(disk.store, NAME, str(disk.folder / "backups"))
    assert told(disk.backup()) == ("full", "no-earlier-backup")


def test_a_repository_is_missed_also_when_its_checkpoints_were_forgotten_by_name(disk: BackedUpDisk) -> None:
    disk.backup()
    unmount(disk)
    with disk.attach() as attached:
        for name in disk.backup_checkpoints():
            attached.forget(name)
    with pytest.raises(NotFound, match="has no backups, but disk 'sda' was backed up to"):
        disk.backup()


def test_a_repository_whose_hold_lapsed_is_missed(disk: BackedUpDisk) -> None:
    disk.backup()
    [file] = hold_files(disk.store.path, disk.disk().uuid)
    assert file.hold is not None
    file.replace(dataclasses.replace(file.hold, used_ns=0))
    disk.backup(to="another")
    unmount(disk)
    with pytest.raises(NotFound, match="on 1970-01-01 00:00 UTC; see whether"):
        disk.backup()


def test_a_first_backup_that_failed_or_was_killed_is_made_again_by_the_same_word(disk: BackedUpDisk) -> None:
    deaths = 0
    for step in range(8, 29, 2):
        deaths += len(disk.backup_and_die(step)) == step
    assert deaths == 11
    assert told(disk.backup()) == ("full", "no-earlier-backup")
