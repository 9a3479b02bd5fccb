"""What a prune makes of chains: which images are written anew, how large, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, NotFound, StorageError
from lmdbitmap.qcow2 import Qcow2Writer
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.repository.manifest_file import MANIFEST, NEXT, ManifestFile
from lmdbitmap.repository.prune import PruneResult, PrunesFailed, prune
from lmdbitmap.repository.repository import known_backups
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.verify import verify
from lmdbitmap.tracker import session
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, RESCAN, BackedUpDisk
from tests.helpers.bad_disk import BAD_DISK, refuse
from tests.helpers.support import requires, run
from tests.helpers.tracked import NAME
from tests.unit.test_digest_algorithms import forget_blake3
from tests.unit.test_verify import few_open_files, flip

pytestmark = pytest.mark.in_memory

KIB = 1 << 10
BLOCK = 4 * KIB
SIZE = 64 * BLOCK + 3


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(os.urandom(SIZE), 0)
    yield made
    made.close()


def back_up(disk: BackedUpDisk, *kinds: BackupType) -> dict[str, bytes]:
    """Backups, each with another block; what the disk held at each."""
    contents: dict[str, bytes] = {}
    for kind in kinds:
        disk.write(os.urandom(BLOCK), (len(contents) + 1) * BLOCK)
        contents[disk.backup(kind).id] = disk.content()
    return contents


def pruned(disk: BackedUpDisk, last: int = 0, **rules: int) -> PruneResult:
    [result] = prune(disk.folder / "backups", [NAME], keep=Retention(last=last, **rules))
    return result


def tree(disk: BackedUpDisk) -> list[tuple[str, str, str | None]]:
    return [(entry.id, entry.type_actual.value, entry.parent) for entry in disk.manifest().backups]


def path_of(disk: BackedUpDisk, number: int) -> Path:
    return Path(disk.backup_folder().path_of(disk.manifest().backups[number].file))


def keep_only(disk: BackedUpDisk, *ids: str) -> PruneResult:
    """By a day for each that is to stay; the others are of the day of the next one that does."""
    manifest, day, dated = disk.manifest(), 1, []
    for entry in manifest.backups:
        dated.append(dataclasses.replace(entry, time_ns=day * 86_400 * 10**9))
        day += entry.id in ids
    disk.backup_folder().replace_manifest(dataclasses.replace(manifest, backups=tuple(dated)))
    result = pruned(disk, daily=len(ids))
    assert [entry.id for entry in result.kept] == list(ids)
    return result


def reads_as(disk: BackedUpDisk, contents: dict[str, bytes]) -> None:
    for entry in disk.manifest().backups:
        assert disk.restored(entry.id) == contents[entry.id], entry.id
    assert disk.files() == sorted(entry.file for entry in disk.manifest().backups)
    assert verify(disk.folder / "backups").is_sound


# --- what becomes of a chain ---


def test_the_oldest_increments_are_merged_into_a_full_one(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL, INCREMENTAL)
    before = disk.manifest().backups
    result = pruned(disk, 2)
    assert tree(disk) == [("3", "full", None), ("4", "incremental", "3")]
    reads_as(disk, contents)
    full, last = disk.manifest().backups
    assert (full.file, full.bytes_changed, full.bytes_zero) == ("000003-incremental.qcow2", SIZE, 0)
    assert full.reason is not None
    assert full.reason.code == "merged"
    assert last == before[3], "what is above is not touched"
    assert [entry.id for entry in result.removed] == ["1", "2"]
    assert (result.rewritten, result.bytes_before) == (("3",), sum(entry.bytes_stored for entry in before))
    assert result.bytes_after == full.bytes_stored + last.bytes_stored


def test_one_in_the_middle_is_merged_into_the_next(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL, INCREMENTAL)
    keep_only(disk, "1", "3", "4")
    assert tree(disk) == [("1", "full", None), ("3", "incremental", "1"), ("4", "incremental", "3")]
    assert disk.manifest().backups[1].bytes_changed == 2 * BLOCK
    reads_as(disk, contents)


def test_differential_backups_that_lose_their_full_one_stay_small(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, DIFFERENTIAL, DIFFERENTIAL, DIFFERENTIAL, DIFFERENTIAL)
    changed = {entry.id: entry.bytes_changed for entry in disk.manifest().backups}
    pruned(disk, 3)
    assert tree(disk) == [("3", "full", None), ("4", "differential", "3"), ("5", "differential", "3")]
    assert [entry.bytes_changed for entry in disk.manifest().backups] == [SIZE, changed["4"], changed["5"]]
    reads_as(disk, contents)


def test_a_branch_that_is_moved_takes_what_the_other_had_changed(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    disk.write(b"x" * BLOCK, 2 * BLOCK)
    contents[disk.backup(DIFFERENTIAL).id] = disk.content()
    keep_only(disk, "2", "4")
    assert tree(disk) == [("2", "full", None), ("4", "differential", "2")]
    reads_as(disk, contents)


def test_a_newer_chain_needs_nothing_of_an_older_one(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, FULL, INCREMENTAL)
    newest = path_of(disk, 3).stat().st_ino, path_of(disk, 2).stat().st_ino
    result = pruned(disk, 2)
    assert tree(disk) == [("3", "full", None), ("4", "incremental", "3")]
    assert (path_of(disk, 1).stat().st_ino, path_of(disk, 0).stat().st_ino) == newest
    assert result.rewritten == ()
    reads_as(disk, contents)


def test_zeroes_over_data_stay_zeroes_over_data_and_are_nothing_in_a_full_one(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL)
    disk.zero(10 * BLOCK, 20 * BLOCK)
    contents[disk.backup().id] = disk.content()
    contents[disk.backup().id] = disk.content()
    keep_only(disk, "1", "4")
    assert disk.manifest().backups[1].bytes_zero == 20 * BLOCK
    pruned(disk, 1)
    assert tree(disk) == [("4", "full", None)]
    assert disk.manifest().backups[0].bytes_zero == 20 * BLOCK
    assert path_of(disk, 0).stat().st_size < SIZE - 12 * BLOCK
    reads_as(disk, contents)


def test_nothing_to_let_go_of_changes_nothing(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    before = disk.manifest(), path_of(disk, 1).stat().st_ino
    result = pruned(disk, 2)
    assert (result.removed, result.rewritten) == ((), ())
    assert (disk.manifest(), path_of(disk, 1).stat().st_ino) == before


def test_a_dry_run_says_the_same_and_touches_nothing(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    before = disk.manifest(), os.listdir(disk.backup_folder().path)
    with disk.backup_folder().locked():  # not even the lock
        [told] = prune(disk.folder / "backups", keep=Retention(last=1), dry_run=True)
    assert (disk.manifest(), os.listdir(disk.backup_folder().path)) == before
    done = pruned(disk, 1)
    assert [entry.id for entry in told.removed] == [entry.id for entry in done.removed] == ["1", "2"]
    assert (told.rewritten, told.bytes_after, told.bytes_before) == (done.rewritten, None, done.bytes_before)


def test_progress_tells_of_bytes_and_what_it_raises_ends_the_work(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)

    def refuse(done: int, total: int) -> NoReturn:
        assert 0 < done <= total
        raise KeyboardInterrupt

    disk.resize(8 << 20)
    disk.write(os.urandom(6 << 20), SIZE)
    contents[disk.backup().id] = disk.content()
    with pytest.raises(KeyboardInterrupt):
        prune(disk.folder / "backups", keep=Retention(last=1), progress=refuse)
    reads_as(disk, contents)


def test_progress_tells_of_what_is_proven_and_what_it_raises_ends_that(disk: BackedUpDisk) -> None:
    disk.resize(12 << 20)
    disk.write(os.urandom(11 << 20), SIZE)
    contents = back_up(disk, FULL, INCREMENTAL)
    folder, stored = disk.backup_folder(), disk.manifest().backups[0].bytes_stored
    told: list[tuple[int, bool]] = []

    def listen(done: int, total: int) -> None:
        assert total == 2 * sum(entry.bytes_stored for entry in entries)
        told.append((done, any(".next" in name for name in os.listdir(folder.path))))

    def cancel(done: int, total: int) -> NoReturn:
        raise KeyboardInterrupt

    entries = disk.manifest().backups
    with pytest.raises(KeyboardInterrupt):
        prune(disk.folder / "backups", keep=Retention(last=1), progress=cancel)
    assert disk.manifest().backups == entries
    reads_as(disk, contents)
    prune(disk.folder / "backups", keep=Retention(last=1), progress=listen)
    assert max(done for done, is_written in told if not is_written) >= stored
    assert told[0][1] is False
    assert any(is_written for _, is_written in told)
    assert told[-1][0] == 2 * sum(entry.bytes_stored for entry in entries)


# --- backups that are named to go ---


def dropped(disk: BackedUpDisk, *ids: str, **options: Any) -> PruneResult:
    [result] = prune(disk.folder / "backups", [NAME], drop=ids, **options)
    return result


def test_a_backup_that_is_dropped_goes_and_all_others_stay(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL, INCREMENTAL)
    result = dropped(disk, "2")
    assert ([entry.id for entry in result.removed], result.rewritten) == (["2"], ("3",))
    assert tree(disk) == [("1", "full", None), ("3", "incremental", "1"), ("4", "incremental", "3")]
    reads_as(disk, contents)
    assert disk.backup().type_actual is INCREMENTAL


def test_what_is_dropped_goes_though_the_rules_want_it(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL, INCREMENTAL)
    dropped(disk, "3", keep=Retention(last=2))
    assert [entry.id for entry in disk.manifest().backups] == ["2", "4"]
    reads_as(disk, contents)


def test_a_damaged_backup_is_dropped_with_what_is_stacked_on_it(disk: BackedUpDisk) -> None:
    """By themselves those above it cannot be merged; what is below is not touched."""
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL, INCREMENTAL)
    flip(path_of(disk, 2), path_of(disk, 2).stat().st_size - BLOCK)
    with pytest.raises(FormatError, match=r"found a flaw: .*000003-incremental"):
        dropped(disk, "3")
    dropped(disk, "3", "4")
    assert [entry.id for entry in disk.manifest().backups] == ["1", "2"]
    reads_as(disk, contents)
    disk.write(os.urandom(BLOCK), 50 * BLOCK)
    entry = disk.backup()
    assert (entry.type_actual, entry.reason and entry.reason.code) == (RESCAN, "checkpoint-forgotten")
    assert disk.restored() == disk.content()


def test_what_cannot_be_dropped_is_told(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    before = disk.manifest()
    with pytest.raises(NotFound, match="has no backup 7"):
        dropped(disk, "1", "7")
    with pytest.raises(InvalidArgument, match="no backup would be kept; keep at least one"):
        dropped(disk, "1", "2")
    with pytest.raises(InvalidArgument, match=r"^2 is not the text of a backup's id; name it like '3'"):
        dropped(disk, "1", cast(str, 2))
    for names in ([], [NAME, NAME]):
        with pytest.raises(InvalidArgument, match="the disk of backup 1 is not named"):
            prune(disk.folder / "backups", names, drop=["1"])
    with pytest.raises(InvalidArgument, match="no backup would be kept"):
        prune(disk.folder / "backups", [NAME])
    assert disk.manifest() == before


# --- what comes after it ---


@pytest.mark.parametrize("last", [1, 2])
def test_the_next_backup_is_an_increment_and_checkpoints_that_nobody_needs_go(
    disk: BackedUpDisk, last: int
) -> None:
    back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    held = disk.manifest().backups[0].checkpoint, disk.manifest().backups[2].checkpoint
    assert set(disk.backup_checkpoints()) == {checkpoint.name for checkpoint in held}
    pruned(disk, last)
    assert held[0] in disk.manifest().released
    entry = disk.backup()
    assert (entry.type_actual, entry.parent, entry.reason) == (INCREMENTAL, "3", None)
    full = [held[1].name] if last == 1 else []  # the merged one's own, if it was the newest
    assert set(disk.backup_checkpoints()) == {entry.checkpoint.name, *full}
    disk.backup()
    assert disk.manifest().released == ()


def test_a_differential_backup_counts_from_a_merged_one_whose_checkpoint_is_held(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    pruned(disk, 1)
    entry = disk.backup(DIFFERENTIAL)
    assert (entry.type_actual, entry.parent) == (DIFFERENTIAL, "2")


def test_a_differential_backup_of_a_merged_one_whose_checkpoint_went_is_full_and_says_so(
    disk: BackedUpDisk,
) -> None:
    back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    pruned(disk, 2)
    entry = disk.backup(DIFFERENTIAL)
    assert (entry.type_actual, entry.reason and entry.reason.code) == (FULL, "checkpoint-forgotten")
    assert disk.backup(DIFFERENTIAL).type_actual is DIFFERENTIAL


# --- what it refuses ---


def test_damage_is_not_merged_into_something_that_looks_sound(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    flip(path_of(disk, 0), 9 * BLOCK)
    before = disk.manifest()
    with pytest.raises(FormatError, match=r"expected sound images, found a flaw: .*000001-full.*bytes 0"):
        pruned(disk, 1)
    assert disk.manifest() == before
    assert disk.files() == [entry.file for entry in before.backups]


@pytest.mark.parametrize("has_its_digests", [True, False])
def test_damage_below_the_new_parent_is_not_merged_either(tmp_path: Path, *, has_its_digests: bool) -> None:
    """A cluster of the one that stays is put together from smaller ones, and from the parent between them."""
    disk = BackedUpDisk(tmp_path, SIZE, granularity_bits=16)
    disk.write(os.urandom(SIZE), 0)
    disk.backup()
    for bits, offset in ((12, 17), (16, 40)):
        session.remove(disk.store, NAME)
        session.add(disk.store, NAME, str(disk.image), granularity_bits=bits)
        disk.write(os.urandom(BLOCK), offset * BLOCK)
        disk.backup(take_over=True)
    before, content, full = disk.manifest(), disk.content(), path_of(disk, 0)
    assert [entry.cluster_size for entry in before.backups] == [65536, 4096, 65536]
    if not has_its_digests:
        [digests] = full.parent.glob(f"{full.name}.*.digests")
        digests.unlink()
    sound = full.read_bytes()
    flip(full, sound.index(content[18 * BLOCK : 19 * BLOCK]))
    with pytest.raises(FormatError, match=r"000001-full.*expected (BLAKE3|SHA-256)"):
        dropped(disk, "2")
    assert disk.manifest() == before
    assert ".next" not in "".join(os.listdir(disk.backup_folder().path))
    full.write_bytes(sound)
    dropped(disk, "2")
    assert disk.restored() == content
    disk.close()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_an_image_whose_digests_are_lost_is_merged_if_it_is_sound(
    disk: BackedUpDisk, *, is_damaged: bool
) -> None:
    contents = back_up(disk, FULL, INCREMENTAL)
    [digests] = path_of(disk, 0).parent.glob("000001-full*.digests")
    digests.unlink()
    if is_damaged:
        flip(path_of(disk, 0), 9 * BLOCK)
        with pytest.raises(FormatError, match=r"found a flaw: .*000001-full.*expected SHA-256"):
            pruned(disk, 1)
        assert len(disk.manifest().backups) == 2
    else:
        pruned(disk, 1)
        reads_as(disk, contents)
        assert verify(disk.folder / "backups").is_sound


def test_damage_in_what_only_goes_is_no_reason_to_keep_it(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, FULL)
    flip(path_of(disk, 0), 9 * BLOCK)
    path_of(disk, 1).unlink()
    pruned(disk, 1)
    reads_as(disk, contents)


@BAD_DISK
def test_what_only_goes_and_cannot_be_removed_stays_and_the_next_backups_are_made(
    disk: BackedUpDisk, error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The prune was decided, and no backup could be made any more before it was carried on."""
    contents = back_up(disk, FULL, INCREMENTAL, FULL)
    stays = path_of(disk, 0)
    refuse(monkeypatch, stays, error)
    pruned(disk, 1)
    assert f"{stays}: {os.strerror(error)}; it is not needed any more: it stays" in caplog.text
    assert disk.files() == ["000001-full.qcow2", "000003-full.qcow2"]
    assert tree(disk) == [("3", "full", None)]
    disk.backup()
    assert (disk.restored("3"), disk.restored()) == (contents["3"], disk.content())
    assert verify(disk.folder / "backups").is_sound


def test_what_is_protected_stays_but_what_would_be_taken_for_a_successor_is_an_error(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `chattr +i`. A successor that nobody decided on would take effect with the next prune."""
    back_up(disk, FULL, INCREMENTAL, FULL)
    refuse(monkeypatch, path_of(disk, 0), errno.EPERM, ["unlink"])
    pruned(disk, 1)
    disk.backup()
    successor = f"{path_of(disk, 0)}.next"
    shutil.copy(path_of(disk, 0), successor)
    refuse(monkeypatch, successor, errno.EPERM, ["unlink"])
    with pytest.raises(StorageError, match=r"qcow2\.next: Operation not permitted"):
        disk.backup()


def test_a_folder_that_is_backed_up_to_is_busy(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    with disk.backup_folder().locked(), pytest.raises(Busy):
        pruned(disk, 1)


def test_what_is_not_there_is_told_before_anything_is_done(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    before = disk.manifest()
    with pytest.raises(NotFound, match="has no backup of a disk called 'sdx'"):
        prune(disk.folder / "backups", [NAME, "sdx"], keep=Retention(last=1))
    with pytest.raises(InvalidArgument, match="no backup would be kept"):
        pruned(disk)
    assert disk.manifest() == before


def test_files_that_are_not_called_as_ours_are_left_alone(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    manifest = disk.manifest()
    victim = dataclasses.replace(manifest.backups[0], file="lock")
    disk.backup_folder().replace_manifest(
        dataclasses.replace(manifest, backups=(victim, manifest.backups[1]))
    )
    with pytest.raises(FormatError, match="expected names of files as this program gives them"):
        pruned(disk, 1)


def test_a_full_disk_costs_nothing_that_was_there(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)

    def refuse(*_: object, **__: object) -> NoReturn:
        raise StorageError("image", OSError(errno.ENOSPC, "no space"), next_step="free some")

    monkeypatch.setattr(Qcow2Writer, "finish", refuse)
    with pytest.raises(StorageError):
        pruned(disk, 1)
    reads_as(disk, contents)
    assert len(contents) == 3


def test_a_long_chain_is_merged_with_few_files_open(tmp_path: Path) -> None:
    disk = BackedUpDisk(tmp_path, SIZE)
    contents = back_up(disk, FULL, *[INCREMENTAL] * 40)
    with few_open_files(100):
        pruned(disk, 2)
    reads_as(disk, contents)
    disk.close()


# --- what a dead prune left ---


def test_what_was_not_decided_is_removed_by_whoever_locks_the_folder(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL)
    folder = disk.backup_folder()
    for name in ("000002-incremental.qcow2.next", "000002-incremental.qcow2.01234567.digests"):
        Path(folder.path_of(name)).write_bytes(b"half")
    reads_as_before = disk.restored("2")
    with folder.locked():
        pass
    assert reads_as_before == contents["2"]
    reads_as(disk, contents)


def test_a_successor_manifest_that_cannot_be_looked_at_is_not_taken_for_missing(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = back_up(disk, FULL, INCREMENTAL)

    def die(manifest: ManifestFile) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(ManifestFile, "copy_successor", die)
        with pytest.raises(KeyboardInterrupt):
            pruned(disk, last=1)
    there = disk.files()
    assert {"manifest.next", "000002-incremental.qcow2.next"} <= set(there)
    with monkeypatch.context() as sick:
        lstat = os.lstat

        def looked_at(path: str, **options: Any) -> os.stat_result:
            if os.fspath(path).endswith("manifest.next"):
                raise OSError(errno.EIO, "a bad sector")
            return lstat(path, **options)

        sick.setattr(os, "lstat", looked_at)
        with pytest.raises(StorageError, match="a bad sector"):
            disk.backup()
    assert disk.files() == there
    assert disk.restored("2") == contents["2"]
    assert (disk.backup().parent, verify(disk.folder / "backups").is_sound) == ("2", True)


def test_a_successor_manifest_that_cannot_be_read_is_told_and_put_aside_by_a_full_backup(
    disk: BackedUpDisk,
) -> None:
    back_up(disk, FULL, INCREMENTAL)
    path = Path(disk.backup_folder().path_of("manifest.next"))
    path.write_bytes(b"{")
    with pytest.raises(FormatError, match=r"manifest\.next: manifest: expected JSON"):
        disk.backup_folder().manifest()
    with pytest.raises(FormatError, match=r"manifest\.next"):
        disk.backup()
    entry = disk.backup(FULL)
    assert (entry.id, entry.reason and entry.reason.code) == ("3", "manifest-unreadable")
    assert [kept.read_bytes() for kept in path.parent.glob("manifest.next.damaged-*")] == [b"{"]
    assert disk.restored() == disk.content()


def test_a_copy_that_came_too_late_for_an_image_loses_nothing(disk: BackedUpDisk) -> None:
    """It was made file by file while a prune took effect: it has the manifest, and still the image from before."""
    contents = back_up(disk, FULL, INCREMENTAL)
    source, copy = disk.backup_folder(), BackupFolder(disk.folder / "copy", NAME)
    shutil.copytree(source.path, copy.path)
    pruned(disk, last=1)
    shutil.copy2(source.path_of(MANIFEST), copy.path_of(NEXT))
    before = sorted(os.listdir(copy.path))
    with pytest.raises(
        FormatError, match=r"expected the images that it names, .*; copy this folder once more"
    ):
        disk.backup(FULL, to="copy")
    assert sorted(os.listdir(copy.path)) == before
    os.unlink(copy.path_of(NEXT))
    assert verify(disk.folder / "copy").is_sound
    assert {entry.id: disk.restored(entry.id, "copy") for entry in disk.manifest("copy").backups} == contents


def beside(disk: BackedUpDisk, name: str) -> Path:
    """The folder of another disk in the same repository, with the same backups."""
    other = BackupFolder(disk.folder / "backups", name)
    shutil.copytree(disk.backup_folder().path, other.path)
    return Path(other.path)


def test_several_disks_are_pruned_each_for_itself(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    beside(disk, "sdb")
    results = prune(disk.folder / "backups", keep=Retention(last=1))
    assert [(result.disk, len(result.removed)) for result in results] == [(NAME, 1), ("sdb", 1)]


def test_an_empty_list_of_names_is_of_no_disk(disk: BackedUpDisk) -> None:
    """Whoever filtered a list down to nothing did not mean all."""
    back_up(disk, FULL, INCREMENTAL)
    before = disk.manifest()
    assert prune(disk.folder / "backups", [], keep=Retention(last=1)) == []
    assert disk.manifest() == before


def test_one_backup_to_drop_is_not_taken_for_its_digits(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    before = disk.manifest()
    with pytest.raises(InvalidArgument, match=r"'12' is one backup where several may be; give \['12'\]"):
        prune(disk.folder / "backups", [NAME], drop="12")
    assert disk.manifest() == before


def test_names_that_are_no_list_are_refused_in_words(disk: BackedUpDisk) -> None:
    back_up(disk, FULL)
    with pytest.raises(InvalidArgument, match=r"'sda' is one name where several may be; give \['sda'\]"):
        prune(disk.folder / "backups", NAME, keep=Retention(last=1))
    with pytest.raises(InvalidArgument, match="a disk is named twice"):
        prune(disk.folder / "backups", [NAME, NAME], keep=Retention(last=1))


def test_a_disk_that_fails_costs_the_others_nothing_and_is_told_of_in_the_end(disk: BackedUpDisk) -> None:
    """The manifest of one is damaged, an image of another, and a third is backed up to."""
    back_up(disk, FULL, INCREMENTAL)
    (beside(disk, "a") / "manifest.json").write_bytes(b"{")
    flip(beside(disk, "b") / "000001-full.qcow2", 9 * BLOCK)
    beside(disk, "c")
    beside(disk, "z")
    for dry_run in (True, False):
        with (
            BackupFolder(disk.folder / "backups", "c").locked(),
            pytest.raises(PrunesFailed, match=r"^[123] of 5 disks (was|were) not pruned: a: .*") as failed,
        ):
            prune(disk.folder / "backups", keep=Retention(last=1), dry_run=dry_run)
        failures = {name: type(error) for name, error in failed.value.failures.items()}
        assert failures == (
            {"a": FormatError} if dry_run else {"a": FormatError, "b": FormatError, "c": Busy}
        )
        done = [result.disk for result in failed.value.results]
        assert done == (["b", "c", NAME, "z"] if dry_run else [NAME, "z"])
    assert failed.value.causes == tuple(failed.value.failures.values())
    assert [len(known_backups(BackupFolder(disk.folder / "backups", name)).backups) for name in "bcz"] == [
        2, 2, 1,
    ]  # fmt: skip


def test_what_a_listener_raises_is_no_failure_of_a_disk(disk: BackedUpDisk) -> None:
    disk.resize(12 << 20)
    disk.write(os.urandom(11 << 20), SIZE)
    back_up(disk, FULL, INCREMENTAL)
    beside(disk, "z")

    def cancel(done: int, total: int) -> NoReturn:
        raise Busy("enough", next_step="stop")

    with pytest.raises(Busy, match="enough"):
        prune(disk.folder / "backups", keep=Retention(last=1), progress=cancel)
    assert len(known_backups(BackupFolder(disk.folder / "backups", "z")).backups) == 2


@requires("qemu-img")
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_clusters_stay_packed_where_backups_are_merged(tmp_path: Path, compression: str) -> None:
    with closing(BackedUpDisk(tmp_path, 1 << 20)) as disk:
        disk.write(b"compressible" * 40_000, 0)
        full = disk.backup(compression=compression)
        disk.write(b"another text" * 1000, 0)
        disk.backup(compression=compression)
        [result] = prune(tmp_path / "backups", [NAME], keep=Retention(last=1))
        [entry] = disk.manifest().backups
        assert result.rewritten == (entry.id,)
        assert entry.compression == full.compression
        assert entry.bytes_stored < 480_000 / 4
        assert disk.restored() == disk.content()
        run("qemu-img", "check", "-q", disk.backup_folder().path_of(entry.file))


@requires("qemu-img")
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_clusters_do_not_grow_with_each_merge(tmp_path: Path, compression: str) -> None:
    """Where a cluster's bytes end, only its last sector's end is known."""
    randomness = random.Random(1)
    halves = b"".join(randomness.randbytes(16) + bytes(16) for _ in range(12 * 4096 // 32))
    with closing(BackedUpDisk(tmp_path, 1 << 20)) as disk:
        for third in range(5):
            disk.write(halves, 12 * 4096 * third)
        stored = []
        for number in range(8):
            if number:
                place = 4096 * 7 * number
                disk.write(halves[:4096], place)
            disk.backup(compression=compression)
            pruned(disk, 1)
            [entry] = disk.manifest().backups
            stored.append(entry.bytes_stored)
        assert max(stored) - stored[0] <= 7 * 1024 + 4096, "some of what was between goes to waste"
        assert disk.restored() == disk.content()
        run("qemu-img", "check", "-q", disk.backup_folder().path_of(entry.file))


@pytest.mark.parametrize("fits", [True, False])
def test_the_library_for_zstd_is_needed_only_for_what_cannot_stay_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    """An image has one kind of compression: of another one clusters are packed anew."""
    with closing(BackedUpDisk(tmp_path, 1 << 20)) as disk:
        for number, compression in enumerate(["zstd", "zstd" if fits else "zlib"]):
            disk.write(b"compressible" * 20_000, number * 300_000)
            disk.backup(compression=compression)
        before, truth = disk.files(), disk.content()
        with monkeypatch.context() as lacking:
            for package in ("backports", "compression"):
                lacking.setitem(sys.modules, package, None)
            if fits:
                pruned(disk, 1)
            else:
                with pytest.raises(NotFound, match="pip install"):
                    pruned(disk, 1)
                assert disk.files() == before
        assert disk.restored() == truth


# --- digests of two kinds ---

SHA, BLAKE = "sha256", "blake3"


@pytest.mark.parametrize(
    "kinds", [(SHA, BLAKE, SHA, BLAKE), (BLAKE, SHA, BLAKE, SHA), (SHA, SHA, BLAKE, SHA)]
)
def test_a_merged_backup_keeps_its_own_kind_of_digests(disk: BackedUpDisk, kinds: tuple[str, ...]) -> None:
    contents = {}
    for number, kind in enumerate(kinds):
        disk.write(os.urandom(BLOCK), number * BLOCK)
        contents[disk.backup(digest=kind).id] = disk.content()
    assert pruned(disk, last=2).rewritten == ("3",)
    assert [entry.digest_algorithm.value for entry in disk.manifest().backups] == list(kinds[2:])
    assert verify(disk.folder / "backups").is_sound
    assert [disk.restored(name) for name in ("3", "4")] == [contents["3"], contents["4"]]


@pytest.mark.parametrize("kinds", [(BLAKE, SHA), (SHA, BLAKE)])
def test_damage_of_either_kind_is_not_merged(disk: BackedUpDisk, kinds: tuple[str, str]) -> None:
    for kind in (*kinds, SHA):
        disk.write(os.urandom(BLOCK), 0)
        disk.backup(digest=kind)
    flip(path_of(disk, 0), 9 * BLOCK)
    with pytest.raises(FormatError, match="expected sound images"):
        pruned(disk, last=2)


def test_without_the_package_for_digests_nothing_is_merged_and_what_only_goes_does(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for digest in (BLAKE, SHA, SHA):
        disk.write(os.urandom(BLOCK), 0)
        disk.backup(FULL if digest is BLAKE else INCREMENTAL, digest=digest)
    before = disk.manifest()
    forget_blake3(monkeypatch)
    for dry_run in (True, False):
        with pytest.raises(NotFound, match=r"000001-full\.qcow2: expected the package blake3"):
            prune(disk.folder / "backups", keep=Retention(last=2), dry_run=dry_run)
    assert disk.manifest() == before
    disk.backup(FULL)
    assert pruned(disk, last=1).rewritten == ()
    assert disk.manifest().format_version == 2
