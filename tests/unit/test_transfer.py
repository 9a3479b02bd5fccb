"""Copies of repositories: what they hold, what is not copied twice, and what they refuse."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from datetime import timezone
from pathlib import Path
from uuid import uuid4

import pytest

from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    LmdbitmapError,
    NotFound,
    StorageError,
    error_from_os,
)
from lmdbitmap.images.file_copy import FileCopier
from lmdbitmap.repository import manifest as manifest_module
from lmdbitmap.repository import transfer
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import TAKEN_OVER_EPOCH, BackupType, DiskRef, Manifest, encode, taken_over
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.repository import known_backups
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.transfer import CopiesFailed, CopyResult, copy_backups
from lmdbitmap.repository.verify import verify
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, BackedUpDisk
from tests.helpers.bad_disk import refuse
from tests.helpers.tracked import NAME
from tests.unit.test_digest_algorithms import forget_blake3
from tests.unit.test_prune import back_up, beside, path_of, reads_as
from tests.unit.test_verify import digests_of, flip, vouch_as_a_whole

pytestmark = pytest.mark.in_memory

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, 3 * MIB + 5)
    made.write(os.urandom(made.size), 0)
    yield made
    made.close()


def copied(disk: BackedUpDisk) -> CopyResult:
    [result] = copy_backups(disk.folder / "backups", disk.folder / "copy", [NAME])
    return result


def folder_of(disk: BackedUpDisk, name: str) -> dict[str, bytes]:
    folder = disk.folder / name / NAME
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_same(disk: BackedUpDisk) -> bool:
    """To the byte, but for who holds the checkpoints: a copy that is backed up to is a holder of its own."""
    assert disk.manifest("backups").holder is not None
    assert disk.manifest("copy").holder is None
    manifest = encode(dataclasses.replace(disk.manifest("backups"), holder=None))
    original = {**folder_of(disk, "backups"), "manifest.json": manifest, "manifest.json.copy": manifest}
    return folder_of(disk, "copy") == original


@pytest.mark.parametrize("kernel_copies", [True, False])
def test_a_copy_is_the_same_to_the_byte(
    disk: BackedUpDisk, kernel_copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "another file system")

    if not kernel_copies:
        monkeypatch.setattr(os, "copy_file_range", refuse)
        monkeypatch.setattr(transfer, "PIECE_BYTES", 70_001)
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    result = copied(disk)
    assert ([entry.id for entry in result.copied], result.already_there) == (["1", "2", "3"], 0)
    assert result.bytes_copied == sum(entry.bytes_stored for entry in disk.manifest().backups)
    assert is_same(disk)
    assert (disk.folder / "copy" / NAME).stat().st_mode & 0o777 == 0o700
    assert disk.restored("2", "copy") == contents["2"]


def test_only_what_is_new_is_copied(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    before = {path.name: path.stat().st_ino for path in (disk.folder / "copy" / NAME).glob("*.qcow2*")}
    disk.backup()
    result = copied(disk)
    assert ([entry.id for entry in result.copied], result.already_there) == (["3"], 2)
    after = {path.name: path.stat().st_ino for path in (disk.folder / "copy" / NAME).glob("*.qcow2*")}
    assert before.items() <= after.items()
    assert is_same(disk)


def test_an_image_that_is_there_already_is_taken_for_what_it_is_and_made_durable(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a copy that was killed, or from `cp`, which syncs nothing."""
    back_up(disk, FULL, INCREMENTAL)
    target = BackupFolder(disk.folder / "copy", NAME)
    with target.locked():
        target.replace_manifest(Manifest(disk.manifest().disk))
    left = Path(target.path_of(disk.manifest().backups[0].file))
    left.write_bytes(path_of(disk, 0).read_bytes())
    inode = left.stat().st_ino
    synced, fsync = set[int](), os.fsync

    def noted(file: int) -> None:
        synced.add(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    copied(disk)
    assert left.stat().st_ino == inode
    assert inode in synced
    assert verify(disk.folder / "copy").is_sound


def test_an_image_that_is_somebody_elses_is_left_alone(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    target = BackupFolder(disk.folder / "copy", NAME)
    with target.locked():
        target.replace_manifest(Manifest(disk.manifest().disk))
    Path(target.path_of(disk.manifest().backups[1].file)).write_bytes(b"mine")
    with pytest.raises(AlreadyExists, match="is another image than backup 2; copy to another repository"):
        copied(disk)
    assert [entry.id for entry in known_backups(target).backups] == ["1"]


def test_a_target_with_other_backups_is_refused(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    disk.backup(to="copy")
    before = folder_of(disk, "copy")
    with pytest.raises(
        AlreadyExists,
        match=r"has a backup 1 that .* does not have, or another of that number; copy to another",
    ):
        copied(disk)
    assert folder_of(disk, "copy") == before


def test_a_target_that_is_ahead_is_refused(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    disk.backup(to="copy")
    with pytest.raises(AlreadyExists, match="has a backup 3 that"):
        copied(disk)


def test_a_target_of_another_disk_is_refused(disk: BackedUpDisk, tmp_path: Path) -> None:
    back_up(disk, FULL)
    (tmp_path / "other").mkdir()
    other = BackedUpDisk(tmp_path / "other", 4096)
    other.backup()
    with pytest.raises(AlreadyExists, match="has the backups of another disk that is called 'sda' too"):
        copy_backups(other.folder / "backups", disk.folder / "backups")
    other.close()


def test_a_target_that_is_backed_up_to_is_busy(disk: BackedUpDisk) -> None:
    back_up(disk, FULL)
    with BackupFolder(disk.folder / "copy", NAME).locked(), pytest.raises(Busy):
        copied(disk)


def test_damage_is_not_copied_and_what_comes_before_it_is(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    flip(path_of(disk, 1), 4096 + 70)
    with pytest.raises(FormatError, match=r"000002-incremental\.qcow2: expected SHA-256"):
        copied(disk)
    names = {name.partition(".")[0] for name in folder_of(disk, "copy")}
    assert "000001-full" in names
    assert disk.restored("1", "copy") == contents["1"]
    assert [entry.id for entry in disk.manifest("copy").backups] == ["1"]
    assert disk.files("copy")[0] == "000001-full.qcow2"
    assert "000002-incremental.qcow2" not in disk.files("copy")


@pytest.mark.parametrize("how", ["rotten", "gone", "unreadable"])
def test_what_stands_in_the_way_of_newer_backups_can_be_dropped(
    disk: BackedUpDisk, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, FULL, INCREMENTAL)
    if how == "rotten":
        flip(path_of(disk, 1), 4096 + 70)
    elif how == "gone":
        path_of(disk, 1).unlink()
    else:
        refuse(monkeypatch, path_of(disk, 1), errno.EUCLEAN)
    with pytest.raises(LmdbitmapError) as refused:
        copied(disk)
    assert refused.value.next_step.endswith(
        "or drop backup 2, and those that need it, with `prune --drop`: until then no newer one is copied"
    )
    prune(disk.folder / "backups", [NAME], drop=["2"])
    assert [entry.id for entry in copied(disk).copied] == ["3", "4"]
    assert [disk.restored(name, "copy") for name in ("1", "3", "4")] == [
        contents[name] for name in ("1", "3", "4")
    ]


def test_nothing_is_to_be_dropped_because_the_target_fails(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    back_up(disk, INCREMENTAL)
    monkeypatch.setattr(FileCopier, "copy", fail_to_write)
    with pytest.raises(StorageError) as refused:
        copied(disk)
    assert "drop" not in refused.value.next_step


def fail_to_write(copier: FileCopier, *_: object) -> None:
    raise error_from_os(copier._place, OSError(errno.EIO, os.strerror(errno.EIO)))


@pytest.mark.parametrize("how", ["lost", "damaged", "of another length"])
def test_digests_that_cannot_be_used_are_computed_from_the_image(disk: BackedUpDisk, how: str) -> None:
    """The manifest vouches for them. More than there can be is not even read: it would fill the target."""
    back_up(disk, FULL)
    path = digests_of(disk, 0)
    digests = path.read_bytes()
    if how == "lost":
        path.unlink()
    elif how == "damaged":
        flip(path, 3)
    else:
        os.truncate(path, 256 << 20)
    copied(disk)
    path.write_bytes(digests)
    assert is_same(disk)


def test_an_image_without_its_digests_that_is_damaged_is_not_copied(disk: BackedUpDisk) -> None:
    back_up(disk, FULL)
    digests_of(disk, 0).unlink()
    flip(path_of(disk, 0), 9 * 4096)
    with pytest.raises(NotFound, match=r"\.digests does not exist"):
        copied(disk)
    assert [name for name in folder_of(disk, "copy") if "qcow2" in name] == []


def test_a_backup_without_digests_of_chunks_is_copied_as_it_is(disk: BackedUpDisk) -> None:
    back_up(disk, FULL)
    digests_of(disk, 0).unlink()
    vouch_as_a_whole(disk, 0)
    copied(disk)
    assert is_same(disk)


# --- and prune, on either side ---


def test_a_source_that_was_pruned_is_copied_to_a_new_place(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    prune(disk.folder / "backups", keep=Retention(last=2))
    copied(disk)
    reads_as(disk, contents)
    assert disk.restored("2", "copy") == contents["2"]
    assert disk.manifest("copy").released == ()


@pytest.mark.parametrize("made_with_cp", [False, True])
def test_checkpoints_of_what_was_pruned_in_a_copy_are_not_listed_for_ever(
    disk: BackedUpDisk, made_with_cp: bool
) -> None:
    """No backup comes that would forget them: they are the original's, which does."""
    contents = back_up(disk, FULL)
    if made_with_cp:
        shutil.copytree(disk.folder / "backups", disk.folder / "copy")
    for _ in range(3):
        more(disk, contents)
        copied(disk)
        assert disk.manifest("copy").released == ()
        prune_to(disk, "copy", 1)
        assert len(disk.manifest("copy").released) == 1
    assert disk.restored(to="copy") == disk.content()


def test_checkpoints_that_a_store_holds_for_the_copy_itself_stay_listed(disk: BackedUpDisk) -> None:
    back_up(disk, FULL)
    copied(disk)
    for _ in range(2):
        disk.backup(to="copy")
    copy_backups(disk.folder / "copy", disk.folder / "backups", [NAME])
    prune_to(disk, "copy", 1)
    listed = disk.manifest("copy").released
    assert listed
    copied(disk)
    assert disk.manifest("copy").released == listed


def test_an_original_keeps_its_list_of_checkpoints_if_its_copy_is_copied_back(disk: BackedUpDisk) -> None:
    """A copy that was made with `cp` has the same holder."""
    back_up(disk, FULL, INCREMENTAL, DIFFERENTIAL)
    shutil.copytree(disk.folder / "backups", disk.folder / "copy")
    prune_to(disk, "backups", 1)
    listed = disk.manifest().released
    copy_backups(disk.folder / "copy", disk.folder / "backups", [NAME])
    assert disk.manifest().released == listed
    newest = disk.backup().checkpoint.name
    assert disk.backup_checkpoints()[-1] == newest
    assert not {reference.name for reference in listed} & set(disk.checkpoints())


def more(disk: BackedUpDisk, contents: dict[str, bytes], *kinds: BackupType) -> None:
    """Backups after those of `contents`, each with another block."""
    for kind in kinds or (INCREMENTAL,):
        disk.write(os.urandom(4096), (len(contents) + 1) * 4096)
        contents[disk.backup(kind).id] = disk.content()


def prune_to(disk: BackedUpDisk, place: str, last: int) -> None:
    prune(disk.folder / place, keep=Retention(last=last))


def holds(disk: BackedUpDisk, contents: dict[str, bytes], *ids: str) -> None:
    """The copy has these backups and no others, each reads as it did, also for QEMU, and no file besides them."""
    backups = disk.manifest("copy").backups
    assert [entry.id for entry in backups] == list(ids)
    for entry in backups:
        assert disk.restored(entry.id, "copy") == contents[entry.id], entry.id
    assert disk.files("copy") == sorted(entry.file for entry in backups)
    assert verify(disk.folder / "copy").is_sound


def test_what_the_source_let_go_of_stays_in_the_copy_and_nothing_there_is_written_anew(
    disk: BackedUpDisk,
) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    copied(disk)
    before = folder_of(disk, "copy")
    more(disk, contents)
    prune_to(disk, "backups", 2)
    result = copied(disk)
    assert [entry.id for entry in result.copied] == ["4"]
    assert (result.already_there, result.only_there, result.left_out) == (1, 2, 0)
    holds(disk, contents, "1", "2", "3", "4")
    after = folder_of(disk, "copy")
    assert {name for name in before if after[name] != before[name]} == {
        "manifest.json", "manifest.json.copy",
    }  # fmt: skip


def test_a_nightly_backup_prune_and_copy_go_on_for_ever(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL)
    for _ in range(8):
        more(disk, contents)
        prune_to(disk, "backups", 2)
        assert [entry.id for entry in copied(disk).copied][-1:] == [str(len(contents))]
        prune_to(disk, "copy", 4)
        ids = [str(number) for number in range(1, len(contents) + 1)]
        holds(disk, contents, *ids[-4:])
        assert [entry.id for entry in disk.manifest().backups] == ids[-2:]


def test_what_the_copy_let_go_of_does_not_come_back(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    copied(disk)
    prune_to(disk, "copy", 1)
    more(disk, contents)
    result = copied(disk)
    assert ([entry.id for entry in result.copied], result.left_out) == (["4"], 2)
    holds(disk, contents, "3", "4")


def test_what_the_copy_let_go_of_comes_back_where_something_new_is_stacked_on_it(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    copied(disk)
    prune_to(disk, "copy", 1)
    more(disk, contents, DIFFERENTIAL)
    result = copied(disk)
    assert ([entry.id for entry in result.copied], result.left_out) == (["1", "4"], 1)
    holds(disk, contents, "1", "3", "4")


def dated(disk: BackedUpDisk, place: str, *days: int) -> None:
    """Let the manifest say on which day of 1970 each backup was made."""
    manifest = disk.manifest(place)
    backups = tuple(
        dataclasses.replace(entry, time_ns=day * 86_400 * 10**9)
        for entry, day in zip(manifest.backups, days, strict=True)
    )
    disk.backup_folder(place).replace_manifest(dataclasses.replace(manifest, backups=backups))


def test_a_backup_that_was_merged_before_it_is_copied_fits_onto_the_copy(disk: BackedUpDisk) -> None:
    """Of five the third and fourth go at the source, and the fifth holds what they changed."""
    contents = back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    disk.resize(disk.size + 4096)
    more(disk, contents)
    disk.resize(disk.size)
    more(disk, contents, INCREMENTAL, INCREMENTAL)
    dated(disk, "backups", 1, 2, 3, 3, 3)
    dated(disk, "copy", 1, 2)
    prune(disk.folder / "backups", keep=Retention(daily=3), zone=timezone.utc)
    assert [(entry.id, entry.parent) for entry in disk.manifest().backups][1:] == [("2", "1"), ("5", "2")]
    prune_to(disk, "copy", 1)
    assert [entry.id for entry in copied(disk).copied] == ["5"]
    holds(disk, contents, "2", "5")


def test_a_source_that_let_go_of_all_that_the_copy_has_is_copied_beside_it(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    more(disk, contents, INCREMENTAL, INCREMENTAL)
    prune_to(disk, "backups", 1)
    result = copied(disk)
    assert ([entry.id for entry in result.copied], result.already_there, result.only_there) == (["4"], 0, 2)
    holds(disk, contents, "1", "2", "4")


def test_what_is_damaged_at_the_source_takes_nothing_from_the_copy(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    copied(disk)
    prune_to(disk, "backups", 1)
    flip(path_of(disk, 0), 4096 + 70)
    more(disk, contents)
    copied(disk)
    holds(disk, contents, "1", "2", "3", "4")
    assert not verify(disk.folder / "backups").is_sound


def test_a_source_that_was_begun_anew_takes_nothing_from_the_copy(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    copied(disk)
    shutil.rmtree(disk.folder / "backups")
    prune_to(disk, "copy", 2)
    before, refusals = folder_of(disk, "copy"), []
    for _ in range(4):
        disk.backup(FULL, new_repository=True)
        prune_to(disk, "backups", 2)
        with pytest.raises(AlreadyExists, match=r"has a backup . that .* does not have") as refused:
            copied(disk)
        refusals.append(refused.value.problem.partition(" that")[0][-1])
    assert refusals == ["2", "2", "2", "3"]
    assert folder_of(disk, "copy") == before


def test_the_copy_follows_a_disk_that_took_the_chain_over(disk: BackedUpDisk) -> None:
    """And nothing counts from the checkpoints of the disk that it was, there either."""
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    copied(disk)
    prune_to(disk, "backups", 2)
    more(disk, contents)
    anew = taken_over(disk.manifest(), DiskRef(NAME, uuid4()))
    disk.backup_folder().replace_manifest(anew)
    copied(disk)
    assert disk.manifest("copy").disk == anew.disk
    assert {entry.epoch for entry in disk.manifest("copy").backups} == {TAKEN_OVER_EPOCH}
    holds(disk, contents, "1", "2", "3", "4")


def test_a_copy_goes_on_after_the_newest_backup_was_dropped(disk: BackedUpDisk) -> None:
    """Its number is not another backup's: the copy has it."""
    contents = back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    prune(disk.folder / "backups", [NAME], drop=["2"])
    assert copied(disk).only_there == 1
    disk.write(os.urandom(4096), 3 * 4096)
    contents["3"] = (disk.backup(), disk.content())[1]
    assert [entry.id for entry in disk.manifest().backups] == ["1", "3"]
    copied(disk)
    holds(disk, contents, "1", "2", "3")
    prune(disk.folder / "backups", [NAME], drop=["3"])
    assert disk.manifest().last_sequence == 3
    assert disk.backup().id == "4"


def test_the_newest_backup_that_the_copy_let_go_of_does_not_come_back(disk: BackedUpDisk) -> None:
    """Somebody dropped it there on purpose; what is stacked on it later brings it back, and says so."""
    contents = back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    prune(disk.folder / "copy", [NAME], drop=["2"])
    again = copied(disk)
    assert ([entry.id for entry in again.copied], again.left_out) == ([], 1)
    holds(disk, contents, "1")
    disk.write(os.urandom(4096), 3 * 4096)
    contents["3"] = (disk.backup(), disk.content())[1]
    assert [entry.id for entry in copied(disk).copied] == ["2", "3"]
    holds(disk, contents, "1", "2", "3")


def test_nothing_counts_from_an_old_checkpoint_in_the_copy_when_a_disk_has_come_back(
    disk: BackedUpDisk,
) -> None:
    """Its uuid is the one that it was, and between the two copies it was another one's."""
    back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    copied(disk)
    prune_to(disk, "backups", 1)
    mine, elsewhere = disk.manifest().disk, DiskRef(NAME, uuid4())
    disk.backup_folder().replace_manifest(taken_over(taken_over(disk.manifest(), elsewhere), mine))
    assert copied(disk).copied == ()
    assert {entry.epoch for entry in disk.manifest("copy").backups} == {TAKEN_OVER_EPOCH}


def test_a_copy_for_which_there_is_no_room_is_refused_before_it_is_made(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    disk.write(os.urandom(4096), 0)
    disk.backup()
    before = folder_of(disk, "copy")
    with monkeypatch.context() as patched:
        patched.setattr(manifest_module, "MAX_MANIFEST_BYTES", manifest_module.MOST_ENTRY_BYTES)
        with pytest.raises(StorageError, match="2 backups leave no room for one more; merge old ones"):
            copied(disk)
    assert folder_of(disk, "copy") == before
    copied(disk)
    assert is_same(disk)


def test_a_copy_that_fails_leaves_nothing_behind(disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    back_up(disk, FULL)
    copied(disk)
    before = folder_of(disk, "copy")
    disk.write(os.urandom(4096), 0)
    disk.backup()

    def refuse(folder: BackupFolder, manifest: Manifest) -> None:
        raise StorageError("copy", OSError("no"), next_step="mend it")

    monkeypatch.setattr(BackupFolder, "succeed", refuse)
    with pytest.raises(StorageError):
        copied(disk)
    assert folder_of(disk, "copy") == before


def test_a_folder_without_backups_yet_is_whoevers_copies_there(disk: BackedUpDisk) -> None:
    """As of a copy that was killed, before another disk took the chain over."""
    contents = back_up(disk, FULL)
    target = disk.backup_folder("copy")
    with target.locked():
        target.replace_manifest(Manifest(DiskRef(NAME, uuid4())))
    copied(disk)
    holds(disk, contents, "1")


def test_what_a_killed_copy_left_of_a_backup_that_was_merged_since_goes(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    more(disk, contents)
    target = disk.backup_folder("copy")
    for name in (digests_of(disk, 2).name, f"{path_of(disk, 2).name}.next"):
        Path(target.path_of(name)).write_bytes(b"of a copy that was killed")
    prune_to(disk, "backups", 1)
    copied(disk)
    holds(disk, contents, "1", "2", "3")


def test_nothing_to_copy_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        copy_backups(tmp_path / "none", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_what_was_there_too(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    copied(disk)
    disk.write(os.urandom(2 * MIB), MIB)
    disk.backup()
    told: list[tuple[int, int]] = []
    copy_backups(disk.folder / "backups", disk.folder / "copy", progress=lambda *news: told.append(news))
    total = sum(entry.bytes_stored for entry in disk.manifest().backups)
    assert told[-1] == (total, total)


def test_a_disk_without_backups_yet_is_in_nobodys_way(disk: BackedUpDisk) -> None:
    """As a first copy leaves it that was killed early."""
    back_up(disk, FULL, INCREMENTAL)
    empty = BackupFolder(disk.folder / "backups", "empty")
    with empty.locked():
        empty.replace_manifest(Manifest(disk.manifest().disk))
    assert [result.disk for result in copy_backups(disk.folder / "backups", disk.folder / "copy")] == [NAME]
    assert [result.disk for result in prune(disk.folder / "backups", keep=Retention(last=1))] == [NAME]
    [flaw] = verify(disk.folder / "backups").flaws
    assert flaw.disk == "empty", "whoever copies it there is to hear that it has not come about"
    with pytest.raises(NotFound):
        copy_backups(disk.folder / "backups", disk.folder / "copy", ["empty"])


def test_an_empty_list_of_names_is_of_no_disk(disk: BackedUpDisk) -> None:
    back_up(disk, FULL)
    assert copy_backups(disk.folder / "backups", disk.folder / "copy", []) == []
    assert not (disk.folder / "copy").exists()


def test_a_disk_that_fails_costs_the_others_nothing_and_is_told_of_in_the_end(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    (beside(disk, "a") / "manifest.json").write_bytes(b"{")
    flip(beside(disk, "b") / "000001-full.qcow2", 4096 + 70)
    beside(disk, "z")
    with pytest.raises(CopiesFailed, match=r"^2 of 4 disks were not copied: a: .*, b: ") as failed:
        copy_backups(disk.folder / "backups", disk.folder / "copy")
    assert [(result.disk, len(result.copied)) for result in failed.value.results] == [(NAME, 2), ("z", 2)]
    assert [*failed.value.failures] == ["a", "b"]
    assert failed.value.next_step == "see each of the `failures`"
    with pytest.raises(NotFound, match="has no backup of a disk called 'sdx'"):
        copy_backups(disk.folder / "backups", disk.folder / "other", ["z", "a", "sdx"])
    assert not (disk.folder / "other").exists()


def test_a_chain_with_digests_of_two_kinds_is_copied_as_it_is(disk: BackedUpDisk) -> None:
    for digest in ("sha256", "blake3", "sha256"):
        disk.write(os.urandom(9000), MIB)
        disk.backup(digest=digest)
    copied(disk)
    assert is_same(disk)
    assert verify(disk.folder / "copy").is_sound


def test_without_the_package_for_digests_no_folder_is_made(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.backup(digest="blake3")
    forget_blake3(monkeypatch)
    with pytest.raises(NotFound, match="expected the package blake3"):
        copied(disk)
    assert not (disk.folder / "copy").exists()


def test_without_the_package_for_digests_nothing_that_needs_it_is_copied(
    disk: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.backup(digest="sha256")
    copied(disk)
    before = folder_of(disk, "copy")
    disk.backup(digest="blake3")
    forget_blake3(monkeypatch)
    with pytest.raises(NotFound, match=r"backups/.*000002-incremental\.qcow2: expected the package blake3"):
        copied(disk)
    assert folder_of(disk, "copy") == before
    monkeypatch.undo()
    assert [entry.id for entry in copied(disk).copied] == ["2"]
    forget_blake3(monkeypatch)
    assert copied(disk).already_there == 2
