"""What can be restored, as a program asks; and a backup served to programs that know nothing of us."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.errors import Busy, FormatError, NotFound
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.repository.restore_points import backed_up_disks, backups_of
from lmdbitmap.restoring.backup_server import serve_backup
from tests.helpers.backed_up import FULL, BackedUpDisk
from tests.helpers.tracked import NAME, quick_folder

BLOCK = 4096
SIZE = 800 * BLOCK


@pytest.fixture
def disk() -> Iterator[BackedUpDisk]:
    with quick_folder() as folder:
        made = BackedUpDisk(folder, SIZE)
        for number in (1, 2):
            made.write(bytes([number]) * BLOCK, BLOCK)
            made.backup()
        yield made
        made.close()


# --- what there is ---


def test_backups_are_listed_for_each_disk_the_oldest_first(disk: BackedUpDisk) -> None:
    repository = disk.folder / "backups"
    assert backed_up_disks(repository) == [NAME]
    listed = backups_of(repository, NAME)
    assert [(entry.id, entry.parent, entry.type_actual.value) for entry in listed] == [
        ("1", None, "full"),
        ("2", "1", "incremental"),
    ]
    assert [disk.restored(entry.id)[BLOCK] for entry in listed] == [1, 2]


def test_what_is_not_there_is_told_and_not_made(disk: BackedUpDisk) -> None:
    with pytest.raises(
        NotFound,
        match="no backup of a disk called 'sdx'; name another disk: the repository has backups of sda",
    ):
        backups_of(disk.folder / "backups", "sdx")
    with pytest.raises(NotFound):
        backed_up_disks(disk.folder / "none")
    (disk.folder / "empty").mkdir()
    assert backed_up_disks(disk.folder / "empty") == []
    assert not (disk.folder / "none").exists()
    assert not (disk.folder / "backups" / "sdx").exists()


def test_a_damaged_manifest_hides_no_other_disk(disk: BackedUpDisk) -> None:
    damaged = disk.folder / "backups" / "sdb"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    assert backed_up_disks(disk.folder / "backups") == [NAME, "sdb"]
    assert len(backups_of(disk.folder / "backups", NAME)) == 2
    with pytest.raises(FormatError, match=r"sdb/manifest\.json"):
        backups_of(disk.folder / "backups", "sdb")


# --- one that is served ---


def first_bytes(uri: str) -> bytes:
    with closing(NbdDevice.open(uri, read_only=True)) as device:
        return device.pread(2, BLOCK)


def test_any_backup_is_served_until_the_block_ends(disk: BackedUpDisk) -> None:
    socket, repository = str(disk.folder / "s"), disk.folder / "backups"
    with serve_backup(repository, NAME, socket, at="1") as server:
        [uri] = server.uris
        assert first_bytes(uri) == b"\1\1"
        with pytest.raises(Busy), serve_backup(repository, NAME, socket):
            raise AssertionError("two at one socket")
        assert disk.backup().sequence == 3, "backups go on meanwhile"
    assert not Path(socket).exists()
    with serve_backup(repository, NAME, socket) as server:
        assert first_bytes(server.uris[0]) == b"\2\2"


def test_a_backup_is_proven_first_where_that_is_wanted(disk: BackedUpDisk) -> None:
    disk.write(os.urandom(600 * BLOCK), 100 * BLOCK)
    image = Path(disk.backup_folder().path_of(disk.backup(FULL).file))
    content = bytearray(image.read_bytes())
    content[3 << 19] ^= 1
    image.write_bytes(content)
    with serve_backup(disk.folder / "backups", NAME, str(disk.folder / "s")) as server:
        assert first_bytes(server.uris[0]) == b"\2\2", "far from what is damaged"
    with (
        pytest.raises(FormatError, match=r"000003-full\.qcow2: expected"),
        serve_backup(disk.folder / "backups", NAME, str(disk.folder / "s"), verify_first=True),
    ):
        raise AssertionError("served before it was proven")


def test_what_nobody_can_prove_piece_by_piece_is_told_to_the_log(
    disk: BackedUpDisk, caplog: pytest.LogCaptureFixture
) -> None:
    chunks = disk.manifest().backups[0].chunks
    assert chunks is not None
    Path(disk.backup_folder().path_of(chunks.file)).unlink()
    with (
        caplog.at_level(logging.WARNING),
        serve_backup(disk.folder / "backups", NAME, str(disk.folder / "s")) as server,
    ):
        assert first_bytes(server.uris[0]) == b"\2\2"
    assert "has no digests by chunks, and is served unproven" in caplog.text
