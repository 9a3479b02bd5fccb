"""A manifest is there twice: the second copy, which is never older, brings it back as the error says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.errors import FormatError, LmdbitmapError
from lmdbitmap.repository import manifest
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import Manifest
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.repository import disk_names
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.verify import verify
from lmdbitmap.system import files
from tests.helpers.backed_up import FULL, INCREMENTAL, BackedUpDisk
from tests.helpers.support import no_ascii
from tests.unit.test_manifest import CHAIN, DISK
from tests.unit.test_prune import SIZE, back_up, reads_as

OLDER = Manifest(DISK, CHAIN.backups[:1])


@pytest.fixture
def folder(tmp_path: Path) -> BackupFolder:
    """With a space in its path, as a command has to survive."""
    made = BackupFolder(tmp_path / "my backups", "sda")
    with made.locked():
        made.replace_manifest(OLDER)
        made.replace_manifest(CHAIN)
    return made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, SIZE)
    made.write(no_ascii(SIZE), 0)
    yield made
    made.close()


def path(folder: BackupFolder, name: str) -> Path:
    return Path(folder.path_of(name))


def said(folder: BackupFolder, name: str = "manifest.json.copy") -> Manifest:
    return manifest.decode(path(folder, name).read_bytes())


def refused(folder: BackupFolder) -> FormatError:
    with pytest.raises(FormatError) as refusal:
        folder.manifest()
    return refusal.value


def do_as_told(refusal: FormatError) -> None:
    command = refusal.next_step.split("`")[1]
    assert command.startswith("cp ")
    subprocess.run(command, shell=True, check=True)


@pytest.mark.parametrize("damage", ["cut", "missing", "another"])
def test_the_command_in_the_error_brings_the_manifest_back(folder: BackupFolder, damage: str) -> None:
    file = path(folder, "manifest.json")
    if damage == "missing":
        file.unlink()
        path(folder, CHAIN.backups[0].file.replace("0000", "000001-full")).touch()
    else:
        file.write_bytes(file.read_bytes()[:-40] if damage == "cut" else b"[]")
    refusal = refused(folder)
    assert f", up to backup {CHAIN.backups[-1].id} of " in refusal.next_step
    assert refusal.next_step.endswith("or begin a new chain with `backup --full`")
    do_as_told(refusal)
    assert folder.manifest() == CHAIN


def test_a_disk_whose_manifest_is_lost_is_still_listed(folder: BackupFolder) -> None:
    path(folder, "manifest.json").unlink()
    assert disk_names(folder.repository_path) == ["sda"]


@pytest.mark.parametrize("copy", ["damaged", "missing", "folder", "empty"])
def test_a_second_copy_that_is_of_no_use_is_not_offered(folder: BackupFolder, copy: str) -> None:
    file = path(folder, "manifest.json.copy")
    file.unlink()
    if copy == "folder":
        file.mkdir()
    elif copy != "missing":
        file.write_bytes(b"{" if copy == "damaged" else manifest.encode(Manifest(DISK)))
    path(folder, "manifest.json").write_bytes(b"{")
    assert refused(folder).next_step.startswith("restore the manifest from a copy of the repository")


def test_a_manifest_of_a_newer_version_is_not_to_be_replaced(folder: BackupFolder) -> None:
    file = path(folder, "manifest.json")
    file.write_bytes(file.read_bytes().replace(b'"format_version": 1', b'"format_version": 9'))
    assert refused(folder).next_step == "use a newer lmdbitmap, or another repository"


def test_whoever_locks_the_folder_makes_the_second_copy_the_manifests(folder: BackupFolder) -> None:
    """As after a death between the two, and where an older version wrote the manifest alone."""
    for content in (manifest.encode(OLDER), b"damaged", None):
        path(folder, "manifest.json.copy").unlink()
        if content is not None:
            path(folder, "manifest.json.copy").write_bytes(content)
        with folder.locked():
            assert said(folder) == CHAIN


def test_a_damaged_manifest_takes_nothing_from_its_second_copy(folder: BackupFolder) -> None:
    path(folder, "manifest.json").write_bytes(b"{")
    with folder.locked():
        assert said(folder) == CHAIN


@pytest.mark.parametrize("in_the_way", [True, False])
def test_where_it_cannot_be_written_a_second_time_there_is_none_that_is_older(
    folder: BackupFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, in_the_way: bool
) -> None:
    copy = path(folder, "manifest.json.copy")
    if in_the_way:
        copy.unlink()
        copy.mkdir()
    rename = os.rename

    def refuse(old: Any, new: Any) -> None:
        if str(new) == str(copy):
            raise OSError(28, "no space left")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    with folder.locked():
        folder.replace_manifest(OLDER)
        assert folder.manifest() == OLDER
        assert copy.is_dir() == in_the_way
        assert copy.exists() == in_the_way
    assert "the manifest is not kept a second time: " in caplog.text


def test_a_succession_that_lost_its_manifest_is_brought_back_once_it_is_copied(folder: BackupFolder) -> None:
    successor = path(folder, "manifest.next")
    successor.write_bytes(b"{")
    assert refused(folder).next_step.startswith("restore the manifest")  # both copies are of before it
    path(folder, "manifest.json.copy").write_bytes(manifest.encode(OLDER))
    do_as_told(refused(folder))
    assert folder.manifest() == OLDER
    with folder.locked():
        assert said(folder, "manifest.json") == said(folder) == OLDER


def test_after_a_prune_all_that_the_second_copy_names_is_there(disk: BackedUpDisk) -> None:
    contents = back_up(disk, FULL, INCREMENTAL, INCREMENTAL, INCREMENTAL)
    prune(disk.folder / "backups", keep=Retention(last=2))
    path(disk.backup_folder(), "manifest.json").write_bytes(b"\0" * 4096)
    do_as_told(refused(disk.backup_folder()))
    reads_as(disk, contents)
    assert verify(disk.folder / "backups").image_count == 2
    assert disk.backup().type_actual is INCREMENTAL


def test_a_full_backup_that_begins_a_new_chain_keeps_the_second_copy_of_the_old_one(
    disk: BackedUpDisk,
) -> None:
    back_up(disk, FULL, INCREMENTAL)
    before, folder = disk.manifest(), disk.backup_folder()
    path(folder, "manifest.json").write_bytes(b"{")
    disk.backup(FULL)
    [kept] = Path(folder.path).glob("manifest.json.copy.damaged-*")
    assert said(folder, kept.name) == before
    assert said(folder) == disk.manifest() != before


# --- the moment at which a succession ends ---


def test_a_reader_that_comes_when_a_succession_ends_finds_what_it_made(
    folder: BackupFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw `manifest.next`, which then got the manifest's name."""
    successor = path(folder, "manifest.next")
    looks: dict[str, tuple[Any, Any]] = {
        "before it looks what it is": (os, os.lstat),
        "before it reads": (os.path, os.path.isfile),
    }
    for moment, (place, look) in looks.items():
        successor.write_bytes(manifest.encode(OLDER))

        def ended_then(asked: Any, look: Any = look) -> Any:
            answer = look(asked)
            if str(asked) == str(successor) and answer:
                successor.rename(path(folder, "manifest.json"))
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(place, look.__name__, ended_then)
            assert folder.manifest() == OLDER, moment
        folder.replace_manifest(CHAIN)
        assert not successor.exists()


def test_files_are_replaced_whole_or_refused(folder: BackupFolder) -> None:
    """The manifest itself is not given up where the disk is full."""
    path(folder, "manifest.json").unlink()
    path(folder, "manifest.json").mkdir()
    with pytest.raises(LmdbitmapError):
        folder.replace_manifest(CHAIN)
    assert files.read_bounded(folder.path_of("manifest.json.copy"), 1 << 20) == manifest.encode(CHAIN)
