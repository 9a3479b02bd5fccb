"""Copies of repositories: what they hold, what is not copied twice, and what they refuse."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap import transfer
from lmdbitmap.errors import AlreadyExists, Busy, FormatError, NotFound
from lmdbitmap.manifest import Manifest, encode
from lmdbitmap.prune import prune
from lmdbitmap.repository import BackupFolder
from lmdbitmap.retention import Retention
from lmdbitmap.transfer import CopyResult, copy_backups
from lmdbitmap.verify import verify
from tests.backed_up import FULL, INCREMENTAL, BackedUpDisk
from tests.tracked import NAME
from tests.unit.test_digest_algorithms import forget_blake3
from tests.unit.test_prune import back_up, path_of, reads_as
from tests.unit.test_verify import digests_of, flip, vouch_as_a_whole

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
    original = {
        **folder_of(disk, "backups"),
        "manifest.json": encode(dataclasses.replace(disk.manifest("backups"), holder=None)),
    }
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


def test_an_image_that_a_killed_copy_left_is_taken_for_what_it_is(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    target = BackupFolder(disk.folder / "copy", NAME)
    with target.locked():
        target.replace_manifest(Manifest(disk.manifest().disk))
    left = Path(target.path_of(disk.manifest().backups[0].file))
    left.write_bytes(path_of(disk, 0).read_bytes())
    inode = left.stat().st_ino
    copied(disk)
    assert left.stat().st_ino == inode
    assert verify(disk.folder / "copy").is_sound


def test_an_image_that_is_somebody_elses_is_left_alone(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    target = BackupFolder(disk.folder / "copy", NAME)
    with target.locked():
        target.replace_manifest(Manifest(disk.manifest().disk))
    Path(target.path_of(disk.manifest().backups[1].file)).write_bytes(b"mine")
    with pytest.raises(AlreadyExists, match="is another image than backup 2; copy to another repository"):
        copied(disk)
    assert [entry.id for entry in target.known_backups().backups] == ["1"]


def test_a_target_with_other_backups_is_refused(disk: BackedUpDisk) -> None:
    back_up(disk, FULL, INCREMENTAL)
    disk.backup(to="copy")
    before = folder_of(disk, "copy")
    with pytest.raises(
        AlreadyExists, match=r"has a backup 1 that .* does not have, or not any more as it was"
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


def test_damaged_digests_are_not_copied(disk: BackedUpDisk) -> None:
    back_up(disk, FULL)
    flip(digests_of(disk, 0), 5)
    with pytest.raises(FormatError, match=r"\.digests: expected SHA-256"):
        copied(disk)
    assert disk.files("copy") == []


def test_a_backup_without_digests_of_chunks_is_copied_as_it_is(disk: BackedUpDisk) -> None:
    back_up(disk, FULL)
    digests_of(disk, 0).unlink()
    vouch_as_a_whole(disk, 0)
    copied(disk)
    assert is_same(disk)


def test_a_source_that_was_pruned_is_copied_to_a_new_place_only(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL)
    prune(disk.folder / "backups", keep=Retention(last=2))
    copied(disk)
    reads_as(disk, contents)
    assert disk.restored("2", "copy") == contents["2"]
    assert disk.manifest("copy").released == ()


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
    assert verify(disk.folder / "backups").is_sound
    with pytest.raises(NotFound):
        copy_backups(disk.folder / "backups", disk.folder / "copy", ["empty"])


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
